"""Two ranks over gloo compute what one rank computes: same weights from the same seed, same logits, same gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import SMALL, logits_of

WORKER = Path(__file__).with_name("parallel_worker.py")
#: Sequence parallelism is on in all of them that split tensors, which covers the norm over heads on several ranks.
SPLIT = "tensor_model_parallel_size=2"
SPLIT_EXPERTS = "tensor_model_parallel_size=2,expert_tensor_parallel_size=2"
EXPERTS_APART = "expert_model_parallel_size=2"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of all layouts, from one pair of processes."""
    folder, root = tmp_path_factory.mktemp("layouts"), WORKER.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{WORKER.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    done = subprocess.run(
        [*command, str(folder), SPLIT, SPLIT_EXPERTS, EXPERTS_APART],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


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


@pytest.mark.parametrize("layout", [SPLIT, SPLIT_EXPERTS])
def test_split_weights_are_the_same_weights_cut(hybrid, results, layout):
    ours, theirs = dict(hybrid.named_parameters()), results[layout]["parameters"]
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(theirs[name], ours[name])] == []


def test_experts_apart_are_the_same_experts(hybrid, results):
    """The first of two expert-parallel ranks holds the first half of the experts."""
    ours, theirs = dict(hybrid.named_parameters()), results[EXPERTS_APART]["parameters"]
    assert sum(".experts." in name for name in theirs) * 2 == sum(".experts." in name for name in ours)
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []


@pytest.mark.parametrize("layout", [SPLIT, SPLIT_EXPERTS, EXPERTS_APART])
def test_logits(hybrid, results, short_tokens, layout):
    torch.testing.assert_close(results[layout]["logits"], logits_of(hybrid, short_tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [SPLIT, SPLIT_EXPERTS])
def test_gradients(results, gradients, layout):
    for name, expected in gradients.items():
        scale = max(1.0, float(expected.abs().max()))
        difference = float((results[layout]["gradients"][name] - expected).abs().max())
        assert difference < 2e-4 * scale, f"{name}: {difference} of {scale}"
