"""Bytes on a rank: the formulas against what Megatron-core allocates and what autograd keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1.config.parallel import Parallel
from m1.planning import arithmetic, memory
from m1.planning.memory import Load
from m1.run import profiles as profile

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("memory_worker.py")
FULL = profile.load("m1-456b")


def run(*command: str) -> list[dict]:
    # The plan is of what runs on GPUs: torch's operations, not the compiled ones of a CPU.
    plain = {"OMP_NUM_THREADS": "1", "M1_KERNELS_NATIVE": "0"}
    environment = {**os.environ, **plain, "PYTHONPATH": f"{ROOT}{os.pathsep}{WORKER.parent}"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def whole():
    """m1-456b on one rank, on the meta device, by the code of a run."""
    return run("-m", "m1.training.measure", "--profile", "m1-456b", "--alone")[0]


def test_full_size_is_the_published_size(whole):
    total = whole["dense"] + whole["head"] + whole["experts"]
    assert round(total / 1e9, 2) == 456.09
    active = total - whole["embedding"] - whole["head"] - whole["norms"] - whole["experts"] * (1 - 2 / 32)
    assert round(active / 1e9, 3) == 45.943
    assert total == arithmetic.parameters(FULL.model).total


def test_full_size_exports_to_the_published_bytes(whole):
    """All in bfloat16 but the routers, as released: 912,210,767,872 bytes."""
    routers = FULL.model.num_layers * FULL.model.num_experts * FULL.model.hidden_size
    total = whole["dense"] + whole["head"] + whole["experts"]
    assert 2 * total + 2 * routers == 912_210_767_872 == arithmetic.checkpoint_bytes(FULL.model)


@pytest.fixture(scope="module")
def ranks():
    """First and last rank and one between, of the profile's own layout, as Megatron-core builds them."""
    size = FULL.parallel.world_size
    wanted = [0, size // 2, size - 1]
    arguments = [x for rank in wanted for x in ("--rank", str(rank))]
    return run("-m", "m1.training.measure", "--profile", "m1-456b", *arguments)


def test_every_rank_of_the_full_layout(ranks):
    per_stage = FULL.parallel.world_size // FULL.parallel.pipeline_model_parallel_size
    for found in ranks:
        stage = found["rank"] // per_stage
        count = memory.local_parameters(FULL.model, FULL.parallel, stage)
        assert (found["dense"], found["head"], found["experts"]) == (count.dense, count.head, count.experts)
        weights, gradients, optimizer = memory.states(FULL.model, FULL.parallel, stage)
        assert found["parameters"] == weights
        # Buffers are padded so that they divide over the replicas; shards are cut by position, not evenly.
        assert found["gradients"] == pytest.approx(gradients, rel=0.001)
        assert found["optimizer"] == pytest.approx(optimizer, rel=0.02)


def test_ranks_of_all_stages_hold_the_model_together():
    parallel = FULL.parallel
    stages = [memory.local_parameters(FULL.model, parallel, s) for s in range(parallel.pipeline_model_parallel_size)]
    experts = sum(count.experts for count in stages)
    experts *= parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    assert experts == arithmetic.parameters(FULL.model).experts
    alone = memory.local_parameters(FULL.model, Parallel(), 0)
    assert alone.dense + alone.head + alone.experts == arithmetic.parameters(FULL.model).total


@pytest.fixture(scope="module")
def small():
    """Two real ranks over gloo at several layouts: bytes after a training step, bytes kept by each layer."""
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER))


def test_weights_gradients_and_optimizer_of_real_ranks(small):
    assert len(small) == 8
    for found in small:
        parallel = Parallel(**found["parallel"])
        weights, gradients, optimizer = memory.states(SMALL, parallel, 0)
        assert found["bytes"]["parameters"] == weights
        # Small weights: padding to 128 elements for each rank shows.
        assert found["bytes"]["gradients"] == pytest.approx(gradients, rel=0.02)
        assert found["bytes"]["optimizer"] == pytest.approx(optimizer, rel=0.1)
        assert found["stepped"] == found["bytes"]["optimizer"]


def test_activations_that_layers_keep(small):
    """Within a tenth of what autograd saves, layer by layer; the lightning and the softmax layer, and the head."""
    for found in small:
        parallel, load = Parallel(**found["parallel"]), Load(**found["load"])
        for kind, softmax in (("lightning", False), ("softmax", True)):
            expected = sum(memory.layer_activations(SMALL, parallel, load, softmax=softmax).values())
            assert found["kept"][kind] == pytest.approx(expected, rel=0.1), (kind, found["parallel"])


from memory_worker import SMALL  # noqa: E402  (after the constants that name its folder)


@pytest.mark.parametrize(("stage", "expected"), [(0, 4), (1, 3), (3, 1)])
def test_micro_batches_in_flight(stage, expected):
    parallel = Parallel(world_size=4, pipeline_model_parallel_size=4)
    assert memory.chunks_in_flight(parallel, Load(64, 1, 16), stage) == expected
    assert memory.chunks_in_flight(parallel, Load(64, 1, 2), stage) == min(2, expected)


def test_layers_of_chunks():
    model = FULL.model
    parallel = Parallel(world_size=4, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    assert memory.pipeline_stages(model, parallel)[1].chunks == (tuple(range(10, 20)), tuple(range(50, 60)))
    placed = Parallel(world_size=2, pipeline_model_parallel_size=2, pipeline_layers=[41, 39])
    assert [stage.layers for stage in memory.pipeline_stages(model, placed)] == [41, 39]
    every = sorted(x for stage in memory.pipeline_stages(model, parallel) for chunk in stage.chunks for x in chunk)
    assert every == list(range(model.num_layers))


def test_recomputation_keeps_less():
    load, kinds = Load(8192, 1, 64), {}
    for recompute in ("none", "full"):
        parallel = FULL.parallel.model_copy(update={"recompute": recompute})
        kinds[recompute] = memory.memory(FULL.model, parallel, load, 0)
    plain, less = kinds["none"], kinds["full"]
    assert less.activations < plain.activations / 4
    assert (less.parameters, less.gradients, less.optimizer) == (plain.parameters, plain.gradients, plain.optimizer)
