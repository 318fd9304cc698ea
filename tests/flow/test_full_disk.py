"""A disk that is full while a stage runs: one line, exit code 4, and the way on; needs root for a small file system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import scratch
from test_plan import make_data

from flows import plan as planning
from infra.launch import run_stage
from m1.errors import ServiceError
from m1.run.resolve import resolve


@pytest.fixture
def small_disk(checkout: Path) -> Iterator[Path]:
    """`runs/` of the checkout on a file system of 3 MB."""
    place = checkout / "runs"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("left", [0, 12_000])
def test_one_line_and_the_way_on(checkout: Path, small_disk: Path, left: int) -> None:
    make_data(checkout)
    request = resolve("pretrain", planning.load_profile("scratch"), scratch.nothing_missing)
    request.run.mkdir(parents=True)
    (request.run / "checkpoints" / "step_00000002").mkdir(parents=True)
    (request.run / "checkpoints" / "step_00000002" / "manifest.json").write_text("{}")
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filling").write_bytes(bytes(free - left))
    with pytest.raises(ServiceError, match=r"pretrain: the disk of runs/scratch/pretrain/\w+ is full") as caught:
        run_stage(request, on_line=lambda line: None)
    assert caught.value.exit_code == 4 and "old runs" in caught.value.hint
    assert caught.value.hint.endswith("checkpoints/step_00000002.") and scratch.stage_processes(checkout) == []

    (small_disk / "filling").unlink()
    assert run_stage(request, on_line=lambda line: None).stage == "pretrain"
