"""Context parallel over 1, 2 and 4 gloo ranks against one process, forward and all gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning_ranks import CASES

from kernels.context_parallel import _Plan, lightning_attention_context_parallel

RANKS = 4
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "lightning_ranks.py"), str(rank), str(RANKS), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        logs = [p.communicate(timeout=300)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_matches_one_process(findings, size, case):
    limit = 2e-2 if case == "bf16" else 2e-6
    for found in findings:
        assert found[f"{size}-{case}"] < limit


def test_one_message_per_pass_whatever_the_length(findings):
    # zigzag: two chunks x batch 1 x 3 heads x 16 x 16 float32
    for found in findings:
        assert found["messages"] == [[2 * 3 * 16 * 16 * 4] * 2] * 2


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_plan_hands_out_every_chunk_once(layout):
    plan = _Plan(size=4, rank=1, layout=layout, local_tokens=8, offsets=None)
    owned = sorted(chunk for own in plan.owners for chunk in own)
    assert owned == list(range(len(owned)))
    assert [plan.span(chunk) for chunk in owned][-1][1] == 32


def test_bad_layouts_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        q = torch.randn(1, 2, 7, 4)
        with pytest.raises(ValueError, match="layout must be one of contiguous, zigzag"):
            lightning_attention_context_parallel(q, q, q, torch.zeros(2), group=None, layout="ring")
        with pytest.raises(ValueError, match="q must have an even sequence length per rank"):
            lightning_attention_context_parallel(q, q, q, torch.zeros(2), group=None, layout="zigzag")
        with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at the sequence length 7"):
            lightning_attention_context_parallel(q, q, q, torch.zeros(2), group=None, cu_seqlens=torch.tensor([0, 14]))
    finally:
        dist.destroy_process_group()
