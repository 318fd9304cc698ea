"""What this machine has, as far as a run must know it before it starts."""

from __future__ import annotations

import shutil
import subprocess

import psutil

from m1.config.parallel import Parallel


def memory_of_rank(parallel: Parallel) -> float:
    """Bytes that one rank of a layout has on this machine: a GPU's memory, or its share of main memory."""
    gpus = gpu_memory()
    return min(gpus) if gpus else psutil.virtual_memory().total / parallel.world_size


def gpu_memory() -> list[float]:
    """Bytes of every GPU here; empty where there is none that the driver knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, encoding="utf-8", errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    values = [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [float(value) * 2**20 for value in values if value.replace(".", "", 1).isdigit()]
