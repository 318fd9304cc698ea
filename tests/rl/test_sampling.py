"""Advantages, rewards, prompt order, dynamic sampling, windows, and the plan of updates."""

import itertools
import json
import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import chat
from m1.config.rl import Cispo, Repetition, Rewards, Rl, WindowCriteria
from m1.config.training import LearningRate
from m1.errors import UsageError
from m1.rollout.engine import Rollout
from m1.run import profiles as profile
from m1.tasks.logic import TASKS
from m1.tasks.prompts import Prompt, first_of_each_task
from stages.rl.advantage import group_advantages
from stages.rl.checks import check
from stages.rl.rewards import Reward, judge, overlong_penalty
from stages.rl.sampling import Group, PromptSampler, dynamic_sampling
from stages.rl.updates import Loss, plan_updates
from stages.rl.windows import WindowSchedule


def section(**changes):
    values = dict(
        windows=[40], train_steps=4, prompts_per_step=6, group_size=4, updates_per_step=4, max_generation_rounds=5,
        micro_batch_size=4, max_prompt_length=100, cispo=Cispo(is_weight_max=5.0), rewards=Rewards(overlong_cache=8),
        repetition=Repetition(consecutive_tokens=10), learning_rate=LearningRate(max=1e-3), checkpoint_every=2,
        evaluate_every=2, evaluate_prompts_per_task=2,
    )  # fmt: skip
    return Rl(**{**values, **changes})


def prompts(count):
    return [Prompt({"id": str(i), "task": f"task{i % 3}"}, [5 + i] * (1 + i % 7)) for i in range(count)]


def group(position, prompt, totals, lengths=None):
    rollouts = [Rollout([9] * n, [-0.5] * n, "stop") for n in lengths or [3] * len(totals)]
    rewards = [Reward(total, total > 0.5, True, 0.0) for total in totals]
    return Group(position, prompt, rollouts, [""] * len(totals), rewards)


# ---------------------------------------------------------------------------------------------------- advantages


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.6, 1.1]), min_size=4, max_size=4), min_size=1, max_size=6))
def test_advantages_are_standardised_rewards(rewards):
    advantages, varied = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    for row, got, keep in zip(rewards, advantages.tolist(), varied.tolist()):
        deviation = statistics.pstdev(row)
        assert keep == (deviation > 1e-6)
        expected = [(r - statistics.fmean(row)) / deviation if keep else 0.0 for r in row]
        assert got == pytest.approx(expected, abs=1e-9)


def test_advantages_ignore_scale_and_shift():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(3 * rewards + 7)[0], group_advantages(rewards)[0])


# ------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (500, -1)]
)
def test_overlong_penalty_follows_dapo_eq_13(length, expected):
    """0 up to 80 = window 100 - cache 20, linear to -1 at the window, -1 beyond."""
    assert overlong_penalty(length, 100, 20) == pytest.approx(expected)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_reward_adds_correctness_format_and_length(task):
    problem = TASKS[task].generate(random.Random(1), 1)
    row = {"task": task, "state": problem.state}
    weights = Rewards(correct=1.0, format=0.1, overlong_cache=10, overlong_penalty=0.5)
    right = chat.render_response("thinking", problem.answer)
    wrong = chat.render_response("thinking", "zzz ?")
    judged = judge(row, right, 30, window=50, weights=weights)
    assert (judged.total, judged.correct, judged.formatted) == (pytest.approx(1.1), True, True)
    assert judge(row, wrong, 30, window=50, weights=weights).total == pytest.approx(0.1)
    assert judge(row, problem.answer, 30, window=50, weights=weights).total == 0.0
    assert judge(row, right, 45, window=50, weights=weights).total == pytest.approx(1.1 - 0.5 * 0.5)


# ------------------------------------------------------------------------------------------------------- sampler


def test_order_is_a_function_of_seed_and_position():
    pool = prompts(10)
    whole = PromptSampler(pool, "3").take(35)
    for first in (1, 10, 17):
        resumed = PromptSampler(pool, "3")
        resumed.take(first)
        again = PromptSampler(pool, "3", cursor=resumed.cursor)
        assert again.take(35 - first) == whole[first:], "resumed"
        twice = PromptSampler(pool, "3", cursor=again.cursor)
        assert twice.take(5) == PromptSampler(pool, "3", cursor=35).take(5), "resumed twice"
    for start in range(0, 30, 10):
        assert {prompt.row["id"] for _, prompt in whole[start : start + 10]} == {str(i) for i in range(10)}
    assert [p for _, p in whole[:10]] != [p for _, p in whole[10:20]]
    assert PromptSampler(pool, "4").take(35) != whole


def test_first_of_each_task():
    chosen = first_of_each_task(prompts(12), 2)
    assert [prompt.row["id"] for prompt in chosen] == ["0", "1", "2", "3", "4", "5"]


# ---------------------------------------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_fills_the_batch_with_groups_that_vary():
    calls = []

    def roll_out(chosen):
        calls.append(len(chosen))
        return [group(p, prompt, [1.1, 0.1, 0.1, 1.1] if p % 3 == 0 else [1.1] * 4) for p, prompt in chosen]

    batch = dynamic_sampling(PromptSampler(prompts(50), "1"), roll_out, section(), multiple=2)
    assert len(batch.groups) == 6 and batch.rounds == len(calls) > 1
    assert all(g.position % 3 == 0 for g in batch.groups)
    assert all(count % 2 == 0 and count <= 6 for count in calls)
    assert len(batch.generated) == sum(calls)
    assert len({g.position for g in batch.generated}) == len(batch.generated), "no position is rolled out twice"
    assert all(g.advantages == pytest.approx([1, -1, -1, 1]) for g in batch.groups)


def test_dynamic_sampling_gives_up_after_its_rounds():
    def roll_out(chosen):
        return [group(p, prompt, [1.1] * 4 if p else [0.0, 1.0, 0.0, 0.0]) for p, prompt in chosen]

    batch = dynamic_sampling(PromptSampler(prompts(50), "1"), roll_out, section(max_generation_rounds=3))
    assert batch.rounds == 3 and [g.position for g in batch.groups] == [0]


# -------------------------------------------------------------------------------------------------------- windows

CRITERIA = WindowCriteria(perplexity_change=0.05, length_fraction=0.9, patience=2, max_steps=5)


def test_window_moves_when_perplexity_has_settled_and_lengths_are_near_it():
    schedule = WindowSchedule([40, 48, 56], CRITERIA)
    for perplexity in (3.0, 2.0):
        assert schedule.update(perplexity, 40) is None, "too few steps to tell"
    assert schedule.update(2.0, 40) is None, "changed by a third over two steps"
    assert "40 -> 48" in schedule.update(2.02, 37)
    assert schedule.window == 48
    assert [schedule.update(2.0, 10) for _ in range(4)] == [None] * 4, "settled, but the lengths are far from 48"
    assert "forced" in schedule.update(2.0, 10)
    assert schedule.window == 56
    assert [schedule.update(2.0, 56) for _ in range(9)] == [None] * 9, "the last window stays"


def test_window_state_survives_json():
    one, values = WindowSchedule([40, 48, 56], CRITERIA), [(2.0 + i % 2 / 50, 40 + i) for i in range(12)]
    for perplexity, length in values[:5]:
        one.update(perplexity, length)
    two = WindowSchedule([40, 48, 56], CRITERIA)
    two.restore(json.loads(json.dumps(one.state())))
    assert [one.update(*v) for v in values[5:]] == [two.update(*v) for v in values[5:]]
    assert one.state() == two.state()


# ------------------------------------------------------------------------------------------------- plan of updates


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 100))
def test_every_response_is_trained_on_once_whatever_the_layout(groups, ranks, updates, micro, seed):
    rng = random.Random(seed)
    made = []
    for i, prompt in enumerate(prompts(groups)):
        made.append(group(i, prompt, [1.0, 0.0, 0.0], [rng.randint(1, 30) for _ in range(3)]))
        made[-1].advantages = [100.0 * i + j + 1 for j in range(3)]  # a name for every response
    options = section(group_size=3, prompts_per_step=updates, updates_per_step=updates, micro_batch_size=micro)
    plans = [plan_updates(made, options, seed="s", rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({tuple(map(len, plan)) for plan in plans}) == 1, "every rank takes the same steps and micro-batches"
    seen, tokens = [], 0
    for update in range(len(plans[0])):
        for batch in (b for plan in plans for b in plan[update]):
            found = []
            for sample in itertools.starmap(slice, itertools.pairwise(batch.offsets)):
                names = set(batch.extra["advantages"][0, sample][batch.loss_mask[0, sample] > 0].tolist())
                assert len(names) <= 1, "one advantage in a response"
                found += names
            assert len(found) <= micro
            seen += found
            tokens += batch.num_tokens
    if len(plans[0]):
        assert sorted(seen) == sorted(a for g in made for a in g.advantages)
        assert tokens == sum(len(r.tokens) for g in made for r in g.rollouts)
    else:
        assert 3 * groups < ranks


def test_batches_carry_labels_and_values_where_the_response_is_predicted():
    made = group(0, Prompt({"id": "a"}, [5, 6, 7]), [1.0, 0.0], [2, 4])
    made.rollouts[0] = Rollout([8, 9], [-0.25, -0.5], "stop")
    made.advantages = [1.5, -1.5]
    ((batch,),) = plan_updates([made], section(updates_per_step=1), seed="s", rank=0, ranks=1)
    at = int((batch.labels[0] == 8).nonzero())  # where the first token of the first response is predicted
    assert batch.tokens[0, at : at + 2].tolist() == [7, 8] and batch.labels[0, at : at + 2].tolist() == [8, 9]
    assert batch.loss_mask[0].sum() == 6 and batch.loss_mask[0, at : at + 2].tolist() == [1, 1]
    assert batch.extra["rollout_logprobs"][0, at : at + 2].tolist() == [-0.25, -0.5]
    assert batch.extra["advantages"][0, at : at + 2].tolist() == [1.5, 1.5]
    assert (batch.tokens[0] == 5).sum() == 1, "one prompt for both responses"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(0, 100))
def test_ranks_have_about_equally_many_tokens(ranks, seed):
    rng = random.Random(seed)
    made = [
        group(i, prompt, [1.0, 0.0], [rng.randint(1, 30) for _ in range(2)]) for i, prompt in enumerate(prompts(12))
    ]
    for each in made:
        each.advantages = [1.0, -1.0]
    options = section(group_size=2, updates_per_step=2, micro_batch_size=100)
    plans = [plan_updates(made, options, seed="s", rank=rank, ranks=ranks) for rank in range(ranks)]
    longest = 30 + max(len(each.prompt.tokens) for each in made)
    for batches in zip(*plans, strict=True):
        tokens = [sum(int((~batch.padding_mask).sum()) for batch in some) for some in batches]
        assert max(tokens) - min(tokens) <= 3 * longest


def test_a_mini_batch_without_old_logprobs_is_trained_at_a_ratio_of_one():
    made = group(0, Prompt({"id": "a"}, [5, 6, 7]), [1.0, 0.0], [2, 4])
    made.advantages = [1.5, -1.5]
    ((batch,),) = plan_updates([made], section(updates_per_step=1), seed="s", rank=0, ranks=1)
    gradients = []
    for old in (None, 0.0, -0.5):
        logprobs = torch.linspace(-2.0, -0.5, batch.tokens.numel()).view(batch.tokens.shape).requires_grad_()
        if old is not None:
            batch.extra["old_logprobs"] = logprobs.detach() + old
        loss = Loss(section())
        loss(logprobs, batch)[0].backward()
        gradients.append(logprobs.grad)
        assert loss.largest_ratio == [pytest.approx(math.exp(-(old or 0.0)))]
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(gradients[0], gradients[2])


# --------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rl-40k.temperature", 0.8, "temperature"),
        ("rl-40k.cispo.is_weight_max", 0.2, "is_weight_max"),
        ("rl-40k.cispo.is_weight_min", 1.5, "is_weight_min"),
        ("rl-40k.rewards.overlong_cache", 4000, "overlong_cache"),
        ("rl-40k.max_prompt_length", 100_000, "max_prompt_length"),
        ("parallel.tensor_model_parallel_size", 2, "tensor_model_parallel_size"),
    ],
)
def test_impossible_settings_are_named_before_any_work(field, value, message):
    check("rl-40k", profile.load("tiny"))
    with pytest.raises(UsageError, match=message):
        check("rl-40k", profile.load("tiny", overrides={field: value}))


def test_perplexity_is_finite_for_the_metrics_of_one_step():
    from stages.rl.rollouts import rollout_metrics
    from stages.rl.sampling import SampledBatch

    groups = [group(0, prompts(1)[0], [1.1, 0.1], [2, 6]), group(1, prompts(1)[0], [1.1, 1.1], [4, 4])]
    groups[0].rollouts[1].finish_reason = "length"
    metrics = rollout_metrics(SampledBatch(groups[:1], groups, 2))
    assert metrics["rl/perplexity"] == pytest.approx(math.exp(0.5))
    assert metrics["rl/response_length"] == 4 and metrics["rl/response_length_p99"] == 6
    assert metrics["rl/truncated"] == 0.25 and metrics["rl/groups_dropped"] == 1
    assert metrics["rl/correct"] == 0.75 and metrics["rl/groups_all_correct"] == 0.5
