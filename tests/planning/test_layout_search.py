"""The search gives possible layouts that fit, fastest first, and says so when there is none."""

from __future__ import annotations

import pytest

from m1.config import layout
from m1.config.parallel import Parallel
from m1.planning import layouts, memory, work
from m1.planning.layouts import Hardware
from m1.run import profiles as profile

FULL = profile.load("m1-456b")
STEPS = {each.name: each for each in work.training_steps(FULL)}
PRETRAIN = STEPS["pretrain"]


@pytest.fixture(scope="module")
def found():
    return layouts.search(FULL.model, PRETRAIN, 512, Hardware())


def test_what_is_found_is_possible_fits_and_is_sorted(found):
    assert len(found) > 10
    for candidate in found:
        parallel = candidate.parallel
        rules = layout.broken_rules(
            FULL.model, parallel, sequence_length=PRETRAIN.sequence_length,
            global_batch_size=PRETRAIN.global_batch_size, micro_batch_size=candidate.load.micro_batch_size,
        )  # fmt: skip
        assert rules == [] and parallel.world_size == 512
        assert candidate.memory.total <= 80e9 * (1 - memory.RESERVE)
        assert 0 < candidate.mfu < 0.6  # below the efficiency that matrix products are given
    times = [candidate.time.total for candidate in found]
    assert times == sorted(times)


def test_found_layouts_pass_the_profile(found):
    """What the search proposes can be written into the profile as it is."""
    best = found[0]
    content = FULL.to_dict()
    content["parallel"] = best.parallel.model_dump()
    content["pretrain"]["micro_batch_size"] = best.load.micro_batch_size
    content["order"] = ["corpus", "tokenizer", "tokens", "pretrain"]
    refused = ""
    try:
        profile.parse(content, "the search")
    except profile.UsageError as error:
        refused = str(error)
    # Other stages have other lengths and batches; pretraining itself must not be among what is refused.
    assert "pretrain" not in refused and "parallel:" not in refused


def test_the_profiles_own_layout_fits_every_stage():
    for each in STEPS.values():
        _, needed = memory.largest(FULL.model, FULL.parallel, work.load(each, FULL.parallel))
        assert needed.total <= 80e9 * (1 - memory.RESERVE), each.name


def test_none_fits_and_the_smallest_cluster_does():
    hardware = Hardware()
    assert layouts.search(FULL.model, PRETRAIN, 64, hardware) == []
    smallest = layouts.smallest_cluster(FULL.model, PRETRAIN, hardware)
    assert smallest is not None
    assert layouts.search(FULL.model, PRETRAIN, smallest, hardware)
    for fewer in range(8, smallest, 8):
        assert layouts.search(FULL.model, PRETRAIN, fewer, hardware) == []


def test_a_small_model_needs_one_gpu():
    tiny = profile.load("tiny")
    first = work.training_steps(tiny)[0]
    assert layouts.smallest_cluster(tiny.model, first, Hardware(), precision="fp32") == 1
    assert layouts.smallest_cluster(tiny.model, first, Hardware(memory=1e6), precision="fp32", limit=64) is None


def time_of(**sizes):
    settings = {"world_size": 512, "precision": "bf16", "pipeline_model_parallel_size": 8, **sizes}
    parallel = Parallel(**settings)
    return layouts.step_time(FULL.model, parallel, work.load(PRETRAIN, parallel), Hardware())


def test_parts_of_a_steps_time():
    plain = time_of(tensor_model_parallel_size=8, expert_model_parallel_size=8)
    assert time_of(expert_model_parallel_size=8).tensor == 0
    assert time_of(tensor_model_parallel_size=8).expert == 0
    assert plain.context == 0
    assert time_of(tensor_model_parallel_size=8, context_parallel_size=2).context > 0
    recomputed = time_of(tensor_model_parallel_size=8, expert_model_parallel_size=8, recompute="full")
    assert 1.2 < recomputed.compute / plain.compute < 4 / 3
    interleaved = time_of(
        tensor_model_parallel_size=8, expert_model_parallel_size=8, virtual_pipeline_model_parallel_size=2
    )
    assert interleaved.bubble < 0.6 * plain.bubble
    assert interleaved.pipeline == pytest.approx(2 * plain.pipeline)


def test_compute_is_the_operations_over_what_the_cluster_does():
    """Without a pipeline every rank has the same work, so nothing is left to the slowest."""
    from m1.planning.arithmetic import training_flops

    hardware = Hardware()
    parallel = Parallel(world_size=64, tensor_model_parallel_size=8, precision="bf16")
    time = layouts.step_time(FULL.model, parallel, work.load(PRETRAIN, parallel), hardware)
    flops = training_flops(FULL.model, PRETRAIN.global_batch_size * PRETRAIN.sequence_length, PRETRAIN.sequence_length)
    assert time.compute * 64 * hardware.flops * hardware.efficiency == pytest.approx(flops, rel=1e-6)


def test_published_budgets():
    assert work.PAPER_RL_GPU_HOURS == 258_048
    assert work.Price().dollars == pytest.approx(2.07, abs=0.005)
    pretrain = FULL.pretrain
    tokens = pretrain.train_steps * pretrain.global_batch_size * pretrain.sequence_length
    assert tokens == pytest.approx(7.5e12, rel=1e-4)


def test_rl_cost_by_hand():
    """Five forward passes for every token: rollout, old log-probabilities, and a training step of three."""
    from m1.planning.arithmetic import forward_flops

    cost = work.rl_cost(FULL.model, FULL.rl_40k, 20_000)
    prompt = 0.97 * 4096 + 0.03 * 17_408  # three prompts of a hundred are software-engineering tasks
    assert cost.tokens == pytest.approx(4000 * 512 * 16 * (20_000 + prompt))
    assert cost.flops == pytest.approx(5 * forward_flops(FULL.model, cost.tokens, 20_000 + prompt), rel=1e-4)
    assert work.rl_cost(FULL.model, FULL.rl_40k).tokens > cost.tokens
    price = work.Price(peak_flops=1e15, mfu=0.5, rollout_mfu=0.1, dollars=2.0)
    assert price.of(cost) == pytest.approx((cost.rollout_flops / 1e14 + cost.training_flops / 5e14) / 3600)
