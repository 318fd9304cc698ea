"""Advantages, rewards, prompt order, dynamic sampling, windows, and the plan of updates."""

import itertools
import json
import math
import random
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import chat
from m1.config.rl import Cispo, Repetition, Rewards, Rl, WindowCriteria
from m1.config.training import LearningRate
from m1.errors import UsageError
from m1.planning import preflight
from m1.rollout.engine import Rollout
from m1.run import profiles
from m1.tasks.base import Row, Verdict
from m1.tasks.logic import TASKS
from m1.tasks.logic.judging import score
from m1.tasks.prompts import Prompt, first_of_each_task
from stages.rl.advantage import group_advantages
from stages.rl.rewards import Reward, overlong_penalty, reward
from stages.rl.sampling import Group, MixedSampler, PromptSampler, dynamic_sampling
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


def row(name, task="task", family="logic"):
    return Row(name, family, task, 1, "", "", "", {})


def prompts(count):
    return [Prompt(row(str(i), f"task{i % 3}"), [5 + i] * (1 + i % 7)) for i in range(count)]


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
    asked = problem.row(with_response=False)
    weights = Rewards(correct=1.0, format=0.1, overlong_cache=10, overlong_penalty=0.5)
    right = chat.render_response("thinking", problem.answer)
    wrong = chat.render_response("thinking", "zzz ?")

    def earned(text, length=30):
        return reward(score(asked, text), length, window=50, weights=weights)

    assert (earned(right).total, earned(right).correct, earned(right).formatted) == (pytest.approx(1.1), True, True)
    assert earned(wrong).total == pytest.approx(0.1)
    assert earned(problem.answer).total == 0.0
    assert earned(right, 45).total == pytest.approx(1.1 - 0.5 * 0.5)


def test_reward_follows_the_verdicts_value_and_keeps_its_end():
    weights = Rewards(correct=2.0, format=0.1, overlong_cache=10)
    half = Verdict(0.5, False, True, end="unresolved")
    assert reward(half, 30, window=50, weights=weights) == Reward(pytest.approx(1.1), False, True, 0.0, "unresolved")
    with pytest.raises(ValueError, match="not judged has no reward: the judge is gone"):
        reward(Verdict(math.nan, False, True, message="the judge is gone", judged=False), 3, window=50, weights=weights)


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
        assert {prompt.row.id for _, prompt in whole[start : start + 10]} == {str(i) for i in range(10)}
    assert [p for _, p in whole[:10]] != [p for _, p in whole[10:20]]
    assert PromptSampler(pool, "4").take(35) != whole


def samplers(*sizes, seed="5"):
    made = [[Prompt(row(f"{family}{i}", family=str(family)), [1]) for i in range(n)] for family, n in enumerate(sizes)]
    return [PromptSampler(each, seed) for each in made]


def taken_by(sampler, total, batch=12):
    """Which sampler each of the first positions was given to, and which prompt."""
    taken = [each for _ in range(-(-total // batch)) for each in sampler.take(batch)]
    order = dict(taken)
    assert sorted(order) == list(range(len(taken))), "every position once"
    return [int(order[position].row.family) for position in range(total)], [order[p].row.id for p in range(total)]


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.floats(0.001, 1.0), st.sampled_from([0.25, 0.1, 1 / 3, 0.5, 1.0])), st.integers(0, 200))
def test_with_one_other_sampler_the_order_is_that_of_the_rounded_down_share(share, total):
    exact = Fraction(share).limit_denominator(1000)
    owners, _ = taken_by(MixedSampler(samplers(7, 5), [1 - share, share]), total)
    for n in range(total + 1):
        assert sum(owners[:n]) == math.floor(n * exact)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(1, 300))
def test_of_three_samplers_each_has_its_share_within_one(first, second, rest, total):
    whole = first + second + rest
    shares = [Fraction(part, whole) for part in (rest, first, second)]
    owners, _ = taken_by(MixedSampler(samplers(11, 7, 5), [float(share) for share in shares]), total)
    for n in range(total + 1):
        counts = [owners[:n].count(number) for number in range(3)]
        for number in (1, 2):
            assert math.floor(n * shares[number]) - counts[number] in (0, 1), "rounded down, or one fewer"
        # What the first has is what the others leave: it may be ahead by as much as they are behind.
        assert 0 <= counts[0] - n * shares[0] < 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 150), st.integers(1, 20))
def test_mixed_samplers_lose_and_double_nothing_and_any_cursor_resumes(parts, rest, cursor, count):
    """Each sampler's own order comes whole, place after place, and stopping at any position changes nothing."""
    whole = sum(parts) + rest
    shares = [rest / whole, *(part / whole for part in parts)]
    sizes = [3 + 2 * number for number in range(len(shares))]
    sampler = MixedSampler(samplers(*sizes), shares)
    before = [sampler.take(1)[0] for _ in range(cursor)]
    assert sampler.cursor == cursor
    batch = sampler.take(count)
    resumed = MixedSampler(samplers(*sizes), shares, cursor=cursor)
    assert resumed.take(count) == batch and resumed.cursor == sampler.cursor == cursor + count
    after, order = resumed.take(40), dict([*before, *batch])
    assert sampler.take(40) == after, "and goes on in the same way"
    order |= dict(after)
    assert sorted(order) == list(range(cursor + count + 40))
    for number, own in enumerate(samplers(*sizes)):
        mine = [order[position] for position in sorted(order) if order[position].row.family == str(number)]
        assert mine == [prompt for _, prompt in own.take(len(mine))]


def test_a_batch_has_sampler_after_sampler_so_that_ranks_have_equally_many_of_each():
    sampler = MixedSampler(samplers(20, 20, 20), [0.5, 0.25, 0.25])
    for _ in range(6):
        batch = sampler.take(16)
        families = [prompt.row.family for _, prompt in batch]
        assert families == sorted(families)
        for family in "012":
            by_rank = [families[rank::2].count(family) for rank in (0, 1)]
            assert abs(by_rank[0] - by_rank[1]) <= 1
        for family in "012":
            positions = [position for position, prompt in batch if prompt.row.family == family]
            assert positions == sorted(positions)


def test_one_sampler_alone_is_taken_as_it_is():
    """As where the only other family is left out: its share goes to the one that is there."""
    (alone,) = samplers(7)
    assert MixedSampler(samplers(7), [0.5]).take(20) == alone.take(20)


def test_first_of_each_task():
    chosen = first_of_each_task(prompts(12), 2)
    assert [prompt.row.id for prompt in chosen] == ["0", "1", "2", "3", "4", "5"]
    families = [Prompt(row(f"{family}{i}", family=family), [1]) for family in ("logic", "swe") for i in range(3)]
    chosen = first_of_each_task(families, 2)
    assert [prompt.row.id for prompt in chosen] == ["logic0", "logic1", "swe0", "swe1"], "a name that two families use"


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
    two = WindowSchedule.resumed([40, 48, 56], CRITERIA, json.loads(json.dumps(one.state())))
    assert [one.update(*v) for v in values[5:]] == [two.update(*v) for v in values[5:]]
    assert one.state() == two.state()
    assert WindowSchedule.resumed([40, 48, 56], CRITERIA, None).state() == {"index": 0, "perplexities": []}


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
    made = group(0, Prompt(row("a"), [5, 6, 7]), [1.0, 0.0], [2, 4])
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
    made = group(0, Prompt(row("a"), [5, 6, 7]), [1.0, 0.0], [2, 4])
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
    ("changes", "message"),
    [
        ({"rl-40k.temperature": 0.8}, r"rl-40k\.temperature=0\.8"),
        ({"rl-40k.cispo.is_weight_max": 0.2}, "is_weight_max=0.2 do not enclose 1"),
        ({"rl-40k.cispo.is_weight_min": 1.5}, "is_weight_min=1.5 and is_weight_max=5.0 do not enclose 1"),
        ({"rl-40k.rewards.overlong_cache": 4000}, r"rewards\.overlong_cache=4000 is not below the first window"),
        ({"rl-40k.max_prompt_length": 100_000}, "rl-40k: max_prompt_length .* exceeds model.max_position_embeddings"),
        ({"rl-40k.prompts_per_step": 63}, "rl-40k: prompts_per_step=63 .* multiples of the data-parallel size 2"),
        ({"rl-40k.updates_per_step": 512}, "responses per update=1 must be multiples of the data-parallel size 2"),
        ({"rl-80k.train_steps": 10}, "10 steps may end in the window of 144 .* never reach 160; .* train_steps=11 or"),
    ],
)
def test_impossible_settings_are_named_when_the_profile_is_read(changes, message):
    assert profiles.load("tiny").name == "tiny"
    with pytest.raises(UsageError, match=message):
        profiles.load("tiny", overrides=changes)
    assert profiles.load("tiny", overrides={"rl-80k.train_steps": 11}).rl_80k.train_steps == 11


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("tensor_model_parallel_size", {}),
        ("pipeline_model_parallel_size", {"model.num_layers": 16}),
        ("context_parallel_size", {}),
        ("expert_model_parallel_size", {}),
    ],
)
def test_what_this_version_cannot_do_is_named_before_any_work(field, more):
    def nothing_missing(need):
        return None

    settings = profiles.load("tiny", overrides={f"parallel.{field}": 2, **more})
    for name in ("rl-40k", "rl-80k"):
        preflight.check(profiles.load("tiny"), [name], nothing_missing)
        with pytest.raises(UsageError, match=rf"{name}: parallel\.{field}=2, but rollouts need the whole model"):
            preflight.check(settings, [name], nothing_missing)


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
