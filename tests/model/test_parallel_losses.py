"""Ranks over gloo compute what one rank computes: weights, logits, gradients, and twenty steps of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import layout_case
import pytest
import torch
from layout_case import STEPS, column
from small_model import SMALL, logits_of

from m1.config import layout
from m1.config.parallel import Parallel
from m1.config.training import Optimizer

WORKER = Path(__file__).with_name("parallel_worker.py")
GOLDEN = json.loads(layout_case.GOLDEN.read_text())
#: Relative difference of losses that is still the same curve, in float32.
SAME = 1e-5

#: Sequence parallelism is on in all of them that split tensors, which covers the norm over heads on several ranks.
TENSORS: dict[str, Any] = {"tensor_model_parallel_size": 2}
TENSORS_AND_EXPERTS = {**TENSORS, "expert_tensor_parallel_size": 2}
STAGES: dict[str, Any] = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**STAGES, "virtual_pipeline_model_parallel_size": 2}
EXPERTS: dict[str, Any] = {"expert_model_parallel_size": 2}
CONTEXT: dict[str, Any] = {"context_parallel_size": 2}

#: Name -> layout, and how samples stand in a micro-batch, of twenty steps of training on two ranks.
TWO_RANKS: dict[str, tuple[dict[str, Any], str]] = {
    "tp2": (TENSORS, "padded"),
    "pp2": (STAGES, "padded"),
    "pp2-interleaved-uneven": ({**INTERLEAVED, "pipeline_layers": [1, 2, 2, 1]}, "padded"),
    "ep2-alltoall": ({**EXPERTS, "moe_token_dispatcher": "alltoall"}, "padded"),
    "ep2-allgather": ({**EXPERTS, "moe_token_dispatcher": "allgather"}, "padded"),
    "cp2": (CONTEXT, "padded"),
    "cp2-packed": (CONTEXT, "packed"),
    "dp2": ({}, "padded"),
    "tp2-continued": (TENSORS, "continued"),
    "pp2-continued": (STAGES, "continued"),
    "ep2-allgather-continued": ({**EXPERTS, "moe_token_dispatcher": "allgather"}, "continued"),
    "tp2-ep2": ({**TENSORS, **EXPERTS}, "padded"),
}
FOUR_RANKS: dict[str, tuple[dict[str, Any], str]] = {
    "tp2-pp2": ({**TENSORS, **STAGES}, "padded"),
    "cp2-tp2-packed": ({**CONTEXT, **TENSORS}, "packed"),
    "pp2-cp2-packed": ({**INTERLEAVED, **CONTEXT, "pipeline_layers": [1, 2, 2, 1]}, "packed"),
    "tp2-dp2-ep2-experts-split": ({**TENSORS_AND_EXPERTS, **EXPERTS}, "padded"),
}
#: Layouts whose gradients are compared one by one: name -> layout.
CUT = {"gradients-tp2": TENSORS, "gradients-tp2-experts-split": TENSORS_AND_EXPERTS, "gradients-ep2": EXPERTS}

#: Ranks that add up vectors.
SUMS = {"sum-of-all": [0, 1, 2, 3], "sum-of-three": [1, 2, 3], "sum-of-one": [2]}


def launch(folder: Path, ranks: int, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of the jobs by name, from one set of processes."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    places = f"{WORKER.parents[2]}{os.pathsep}{WORKER.parent}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    done = subprocess.run(
        [*command, str(folder / "jobs.json"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


def training(checkpoint: Path, layouts: dict[str, tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "kind": "train", "layout": sizes, "form": form, "checkpoint": str(checkpoint)}
        for name, (sizes, form) in layouts.items()
    ]


@pytest.fixture(scope="module")
def seed_checkpoint(tmp_path_factory):
    """Initial weights, saved by one rank."""
    from m1.training import parallel
    from m1.training.trainer import Trainer

    parallel.initialize(Parallel(), 1)
    trainer = Trainer(layout_case.MODEL, Parallel(), seed=layout_case.SEED, optimizer=Optimizer())
    return trainer.save(tmp_path_factory.mktemp("seed") / "step_00000000", {"step": 0})


@pytest.fixture(scope="module")
def alone(seed_checkpoint):
    """Twenty steps on one rank."""
    return layout_case.train(Parallel(), seed_checkpoint)


@pytest.fixture(scope="module")
def two(tmp_path_factory, seed_checkpoint):
    cut = [{"name": name, "kind": "gradients", "layout": sizes} for name, sizes in CUT.items()]
    return launch(tmp_path_factory.mktemp("two") / "jobs", 2, cut + training(seed_checkpoint, TWO_RANKS))


@pytest.fixture(scope="module")
def four(tmp_path_factory, seed_checkpoint):
    sums = [{"name": name, "kind": "sum", "ranks": ranks} for name, ranks in SUMS.items()]
    return launch(tmp_path_factory.mktemp("four") / "jobs", 4, sums + training(seed_checkpoint, FOUR_RANKS))


# ---------------------------------------------------------------------- sums over ranks


@pytest.mark.parametrize("name", SUMS)
def test_ranks_add_up_in_their_order(four, name):
    terms = [torch.randn(12, generator=torch.Generator().manual_seed(rank)) for rank in SUMS[name]]
    expected = terms[0].clone()
    for term in terms[1:]:
        expected += term
    assert torch.equal(four[name], expected)


# ---------------------------------------------------------------------- twenty steps


def largest_difference(values: list[float], expected: list[float]) -> float:
    """Relative, over all steps."""
    assert len(values) == len(expected) == STEPS
    return max(abs(value - right) / abs(right) for value, right in zip(values, expected))


def assert_same_training(name: str, reports: list[dict[str, float]]) -> None:
    """The golden curve; Adam would hide gradients of a wrong scale, so their norm is compared too."""
    difference = {key: largest_difference(column(reports, key), GOLDEN[key]) for key in GOLDEN}
    print(name, difference)
    assert difference["loss"] < SAME
    assert difference["moe_aux_loss"] < SAME
    assert difference["grad_norm"] < 10 * SAME


def test_golden_losses_fall():
    """Twenty steps learn something, so that equal curves mean equal training."""
    assert GOLDEN["loss"][-1] < 0.8 * GOLDEN["loss"][0]


def test_one_rank_gives_the_golden_losses(alone):
    assert_same_training("alone", alone)


@pytest.mark.parametrize("settings", [{"recompute": "full"}, {"moe_token_dispatcher": "alltoall"}])
def test_one_rank_gives_them_otherwise(seed_checkpoint, alone, settings):
    """Bit for bit with recomputation; another way to the experts sums in another order."""
    reports = layout_case.train(Parallel(**settings), seed_checkpoint)
    assert_same_training(str(settings), reports)
    if "recompute" in settings:
        assert reports == alone


@pytest.mark.parametrize("form", ["packed", "continued"])
def test_packed_samples_give_the_losses_of_padded_ones(seed_checkpoint, form):
    """Nothing crosses from one sample to the next, and all that it sees reaches one that continues another."""
    assert_same_training(form, layout_case.train(Parallel(), seed_checkpoint, form=form))


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_give_the_golden_losses(two, name):
    assert_same_training(name, two[name])


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_give_the_golden_losses(four, name):
    assert_same_training(name, four[name])


@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_the_layout_breaks_no_rule(name):
    sizes, _ = {**TWO_RANKS, **FOUR_RANKS}[name]
    ranks = 2 if name in TWO_RANKS else 4
    assert layout.broken_rules(layout_case.MODEL, Parallel(world_size=ranks, **sizes)) == []


def test_expert_loads_do_not_depend_on_the_layout(two, four, alone):
    names = [name for name in alone[0] if name.startswith("moe_load")]
    assert len(names) == layout_case.MODEL.num_experts + 1
    for reports in (*(two[name] for name in TWO_RANKS), *(four[name] for name in FOUR_RANKS)):
        for name in names:
            assert column(reports, name) == pytest.approx(column(alone, name), abs=1e-2)


# ---------------------------------------------------------------------- weights, logits, gradients


@pytest.fixture(scope="module")
def short_tokens():
    return torch.randint(0, SMALL.vocab_size, (2, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def gradients(hybrid, short_tokens):
    """Gradients of one rank, of the loss that the worker uses."""
    logits = hybrid(short_tokens, torch.arange(64).expand_as(short_tokens), None)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in hybrid.named_parameters()}
    hybrid.zero_grad()
    return found


@pytest.mark.parametrize("name", ["gradients-tp2", "gradients-tp2-experts-split"])
def test_split_weights_are_the_same_weights_cut(hybrid, two, name):
    ours, theirs = dict(hybrid.named_parameters()), two[name]["parameters"]
    assert theirs.keys() == ours.keys()
    assert [each for each in ours if not torch.equal(theirs[each], ours[each])] == []


def test_experts_apart_are_the_same_experts(hybrid, two):
    """The first of two expert-parallel ranks holds the first half of the experts."""
    ours, theirs = dict(hybrid.named_parameters()), two["gradients-ep2"]["parameters"]
    assert sum(".experts." in name for name in theirs) * 2 == sum(".experts." in name for name in ours)
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []


@pytest.mark.parametrize("name", CUT)
def test_logits(hybrid, two, short_tokens, name):
    torch.testing.assert_close(two[name]["logits"], logits_of(hybrid, short_tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gradients-tp2", "gradients-tp2-experts-split"])
def test_gradients(two, gradients, name):
    for parameter, expected in gradients.items():
        scale = max(1.0, float(expected.abs().max()))
        difference = float((two[name]["gradients"][parameter] - expected).abs().max())
        assert difference < 2e-4 * scale, f"{parameter}: {difference} of {scale}"
