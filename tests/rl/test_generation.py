"""Sampling: the distribution, the nucleus, the stops, and independence of the batch."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.rl import Repetition
from m1.errors import M1Error
from m1.rollout.engine import RolloutEngine, Sampling, row_seed
from m1.rollout.recurrent import RecurrentEngine, generate
from m1.rollout.sampling import nucleus, sample
from m1.training.stopping import StopRequested

SMALL = Model(
    num_layers=4, softmax_every=4, hidden_size=32, num_attention_heads=2, num_query_groups=1, head_dim=16,
    num_experts=3, moe_router_topk=2, moe_ffn_hidden_size=24, vocab_size=300, max_position_embeddings=512,
)  # fmt: skip
EOS = 3


@pytest.fixture(scope="module")
def decoder():
    from m1.model.hybrid import build_model
    from m1.rollout.decoder import Decoder
    from m1.training import parallel

    parallel.initialize(Parallel(), 1)
    model = build_model(SMALL, Parallel(), seed=11)
    with torch.no_grad():
        model.output_layer.weight.mul_(3.0)  # an untrained head is nearly uniform
        model.output_layer.weight[EOS].mul_(2.0)  # some rows end early
    return Decoder(model)


def brute_force_nucleus(probabilities, top_p):
    """Add the most probable tokens one by one until they reach top_p."""
    total, chosen = 0.0, set()
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= top_p:
            break
        chosen.add(token)
        total += probabilities[token]
    return chosen


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.floats(0.05, 0.99), st.floats(0.1, 6.0), st.integers(0, 10_000))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(size, top_p, sharpness, seed):
    logits = sharpness * torch.randn(1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = torch.softmax(logits, dim=-1)
    values, order = nucleus(probabilities, top_p)
    assert set(order[0][values[0] > 0].tolist()) == brute_force_nucleus(probabilities[0].tolist(), top_p)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.5, 0.6)])
def test_sampled_frequencies_match_the_probabilities(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, -200.0])
    expected = torch.softmax(logits / temperature, dim=-1)
    nuclear = brute_force_nucleus(expected.tolist(), top_p)
    expected = torch.tensor([p if i in nuclear else 0.0 for i, p in enumerate(expected.tolist())])
    expected /= expected.sum()
    draws = 200_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample(logits.expand(draws, -1), uniforms, temperature=temperature, top_p=top_p)
    frequency = torch.bincount(tokens, minlength=len(logits)) / draws
    five_sigma = 5 * (expected * (1 - expected) / draws).sqrt()
    assert bool(((frequency - expected).abs() <= five_sigma).all()), (frequency, expected)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=-1)[tokens])


def test_the_ends_of_the_uniform_range_give_tokens_with_mass():
    logits = torch.full((2, 50), -torch.inf)
    logits[:, 20:23] = torch.tensor([0.0, 1.0, 0.5])
    tokens, _ = sample(logits, torch.tensor([0.0, math.nextafter(1.0, 0.0)]))
    assert tokens.tolist() == [20, 22]


def prompts_and_seeds(groups, size):
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 300, (3 + 7 * i,), generator=generator).tolist() for i in range(groups)]
    return prompts, [[row_seed("test", i, j) for j in range(size)] for i in range(groups)]


def test_results_do_not_depend_on_the_batch(decoder):
    prompts, seeds = prompts_and_seeds(5, 6)
    settings = {"max_new_tokens": 40, "eos_id": EOS}
    whole = generate(decoder, prompts, seeds=seeds, **settings)
    assert len({len(r.tokens) for group in whole for r in group}) > 5, "rows must end at different times"
    refilled = generate(decoder, prompts, seeds=seeds, batch_size=7, **settings)
    alone = generate(decoder, prompts[2:3], seeds=[seeds[2][4:5]], **settings)
    assert [[r.tokens for r in group] for group in refilled] == [[r.tokens for r in group] for group in whole]
    assert alone[0][0].tokens == whole[2][4].tokens
    again = generate(decoder, prompts, seeds=seeds, **settings)
    assert again == whole, "the same call gives the same result bit for bit"


def test_logprobs_are_those_of_the_training_forward(decoder):
    prompts, seeds = prompts_and_seeds(3, 2)
    for prompt, group in zip(prompts, generate(decoder, prompts, seeds=seeds, max_new_tokens=30, eos_id=EOS)):
        for rollout in group:
            ids = torch.tensor([prompt + rollout.tokens])
            with torch.no_grad():
                logits = decoder.model(ids, torch.arange(ids.shape[1])[None], None)
            expected = torch.log_softmax(logits[0, len(prompt) - 1 : -1], dim=-1)
            expected = expected.gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=0, atol=1e-4)


def test_rows_stop_at_the_end_token_or_the_window(decoder):
    prompts, seeds = prompts_and_seeds(4, 8)
    rollouts = [r for g in generate(decoder, prompts, seeds=seeds, max_new_tokens=40, eos_id=EOS) for r in g]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert EOS not in rollout.tokens[:-1]
        assert (rollout.tokens[-1] == EOS) == (rollout.finish_reason == "stop")
        assert len(rollout.tokens) == len(rollout.logprobs) <= 40
        assert rollout.finish_reason == "stop" or len(rollout.tokens) == 40


def test_repetition_stop_counts_consecutive_probable_tokens(decoder):
    """Against the rule applied afterwards to rollouts that were not stopped."""
    prompts, seeds = prompts_and_seeds(4, 8)
    rule = Repetition(consecutive_tokens=2, probability=0.02)
    free = generate(decoder, prompts, seeds=seeds, max_new_tokens=40, eos_id=EOS)
    stopped = generate(decoder, prompts, seeds=seeds, max_new_tokens=40, eos_id=EOS, repetition=rule)
    seen = 0
    for before, after in zip([r for g in free for r in g], [r for g in stopped for r in g], strict=True):
        run, end = 0, None
        for i, (token, logprob) in enumerate(zip(before.tokens, before.logprobs, strict=True)):
            run = run + 1 if math.exp(logprob) > rule.probability else 0
            if run == rule.consecutive_tokens and token != EOS:
                end = i + 1
                break
            if token == EOS:
                break
        seen += end is not None
        assert after.tokens == before.tokens[: end or len(before.tokens)]
        assert after.finish_reason == ("repetition" if end else before.finish_reason)
    assert 0 < seen < 32


def test_prompts_without_seeds_are_left_out(decoder):
    prompts, _ = prompts_and_seeds(3, 1)
    results = generate(decoder, prompts, seeds=[[], [5], []], max_new_tokens=4, eos_id=EOS)
    assert [len(group) for group in results] == [0, 1, 0]
    assert generate(decoder, [], seeds=[], max_new_tokens=4, eos_id=EOS) == []


# ------------------------------------------------------------------------------------------------ the engine


def test_the_recurrent_engine_fulfils_the_protocol():
    """Whatever the protocol names is there, with the same parameters."""
    for name, wanted in vars(RolloutEngine).items():
        if name.startswith("_") or not inspect.isfunction(wanted):
            continue
        found = inspect.signature(getattr(RecurrentEngine, name)).parameters
        expected = inspect.signature(wanted).parameters
        assert [(p.name, p.kind, p.default) for p in found.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ]
    assert {"generate", "update_weights", "close"} <= set(vars(RolloutEngine))
    assert set(RolloutEngine.__annotations__) == {"weight_version"}


def test_rollouts_carry_the_version_of_the_weights_that_update_raises(decoder):
    engine = RecurrentEngine(decoder.model, EOS)
    prompts, seeds = prompts_and_seeds(2, 3)
    sampling = Sampling(6)
    assert engine.weight_version == 0
    first = engine.generate(prompts, seeds, sampling)
    engine.update_weights(7)
    later = engine.generate(prompts, seeds, sampling)
    engine.close()
    assert engine.weight_version == 7
    assert {r.weight_version for group in first for r in group} == {0}, "what was sampled before keeps its version"
    assert {r.weight_version for group in later for r in group} == {7}
    for before, after in zip((r for g in first for r in g), (r for g in later for r in g), strict=True):
        assert (before.tokens, before.logprobs) == (after.tokens, after.logprobs), "the weights themselves are the same"


def test_the_engine_generates_with_the_trainers_present_weights(decoder):
    engine = RecurrentEngine(decoder.model, EOS)
    prompts, seeds = prompts_and_seeds(1, 4)
    before = engine.generate(prompts, seeds, Sampling(12))
    weight = decoder.model.output_layer.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[EOS] += 100 * weight[EOS].sign()  # another policy
        engine.update_weights(1)
        after = engine.generate(prompts, seeds, Sampling(12))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    engine.update_weights(2)
    again = engine.generate(prompts, seeds, Sampling(12))
    assert [r.tokens for r in after[0]] != [r.tokens for r in before[0]] == [r.tokens for r in again[0]]


def test_the_engine_samples_as_it_is_told(decoder):
    """Window, temperature, nucleus and the stop on repetition reach the sampler."""
    prompts, seeds = prompts_and_seeds(3, 4)
    engine = RecurrentEngine(decoder.model, EOS, batch_size=5)
    rule = Repetition(consecutive_tokens=2, probability=0.02)
    told = Sampling(15, temperature=0.8, top_p=0.9, repetition=rule)
    expected = generate(
        decoder, prompts, seeds=seeds, max_new_tokens=15, eos_id=EOS, temperature=0.8, top_p=0.9, repetition=rule,
        batch_size=5,
    )  # fmt: skip
    assert engine.generate(prompts, seeds, told) == expected
    for other in (Sampling(14, 0.8, 0.9, rule), Sampling(15, 1.3, 0.9, rule), Sampling(15, 0.8, 0.2, rule),
                  Sampling(15, 0.8, 0.9)):  # fmt: skip
        assert engine.generate(prompts, seeds, other) != expected


def test_the_engine_abandons_what_it_generates_when_it_is_told_to_stop(decoder):
    class Told:
        def noticed(self):
            return True

        def agreed(self):
            return True

    prompts, seeds = prompts_and_seeds(1, 2)
    with pytest.raises(StopRequested):
        RecurrentEngine(decoder.model, EOS).generate(prompts, seeds, Sampling(10), Told())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logits_that_are_not_finite_are_named(decoder, value, top_p):
    weight = decoder.model.output_layer.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[5].fill_(value)
        with pytest.raises(M1Error, match="logits are not finite numbers after 0 tokens"):
            generate(decoder, [[1, 2]], max_new_tokens=2, eos_id=EOS, seeds=[[1]], top_p=top_p)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
