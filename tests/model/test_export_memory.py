"""Conversion streams: a model of many files passes through a process that holds about one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from small_model import ALONE, SMALL

#: About 90 MB in float32: large beside one file of 4 MB and beside what the process allocates anyway.
LARGE = SMALL.model_copy(
    update={"hidden_size": 256, "moe_ffn_hidden_size": 448, "num_experts": 8, "num_layers": 8, "rotary_base": 1e4}
)
SHARD_BYTES = 4_000_000


def test_memory_is_about_one_file(tmp_path):
    from m1.model.hybrid import build_model
    from m1.training import checkpoint, parallel

    parallel.initialize(ALONE, 1)
    model = build_model(LARGE, ALONE, seed=1)
    size = sum(parameter.nbytes for parameter in model.parameters())
    checkpoint.save(tmp_path / "step_1", model, None, {"rotary_base": 1e4})
    del model
    worker = Path(__file__).with_name("export_memory.py")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000",
        "PYTHONPATH": f"{worker.parents[2]}{os.pathsep}{worker.parent}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path / "step_1"), str(tmp_path / "out"), str(SHARD_BYTES)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: int(size) for name, size in (line.split() for line in done.stdout.splitlines()[-3:])}
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) >= 20 and sum(file.stat().st_size for file in files) > size > 80_000_000
    assert found.keys() == {"write", "check", "read"}
    # One file, the parameter that is being read, its copies, and what the allocator keeps: far below the model.
    for step, extra in found.items():
        assert extra < 8 * SHARD_BYTES < size / 2, f"{step}: {extra}"
