"""Run by test_export_memory: what one process needs beyond what it needs anyway, for every step of a conversion.

usage: export_memory.py CHECKPOINT FOLDER SHARD_BYTES   (the model is the profile's `large_model` of test_export_memory)
Prints one line `NAME BYTES` per step: the peak of resident memory over the step, less the memory before it.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from test_export_memory import LARGE

import m1.model  # noqa: F401  (makes Megatron-core usable here, before anything imports it)
from m1.formats import folder as interchange
from m1.formats.mapping import FolderReader, Form, exported, trained, trained_shapes
from m1.formats.megatron import CheckpointTensors
from stages.export import check, files


def memory(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak since `forget_peak`) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return memory("VmRSS")


def main() -> None:
    checkpoint, folder, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    form = Form("minimax-m1", "fp32")
    exported(LARGE, form)
    source = CheckpointTensors(checkpoint)
    folder.mkdir()
    files.write_config(folder, LARGE, form, LARGE.rotary_base, {})

    before = forget_peak()
    files.write_weights(folder, source, LARGE, form, shard_bytes)
    print("write", memory("VmHWM") - before)

    before = forget_peak()
    check.weights(folder, source, LARGE, form)
    print("check", memory("VmHWM") - before)

    base = interchange.inspect(folder, LARGE)
    before = forget_peak()
    with FolderReader(base, LARGE) as read:
        for name in trained_shapes(LARGE):
            trained(read, name, LARGE, base.layout, rank=1, ranks=2)
    print("read", memory("VmHWM") - before)


if __name__ == "__main__":
    main()
