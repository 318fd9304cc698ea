"""The random generators of a training process, in a checkpoint: Python's, numpy's, torch's and Megatron's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch

from m1.training import parallel


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"random_{rank:05d}.pt"


def write(folder: Path) -> Path:
    """Write the state of this rank's generators; returns the file."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, words, gauss = random.getstate()
    keys: Any = numpy.random.get_state(legacy=False)
    content = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(keys["state"]["key"].astype(numpy.int64)),
            "pos": int(keys["state"]["pos"]),
            "has_gauss": int(keys["has_gauss"]),
            "gauss": float(keys["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    file = file_of(folder, parallel.rank())
    torch.save(content, file)
    return file


def restore(folder: Path) -> None:
    """Set this rank's generators to what `write` found. Reads tensors and numbers only, no pickled code."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    content = torch.load(file_of(folder, parallel.rank()), weights_only=True)
    python, keys = content["python"], content["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    numpy.random.set_state(
        ("MT19937", keys["key"].numpy().astype(numpy.uint32), keys["pos"], keys["has_gauss"], keys["gauss"])
    )
    torch.set_rng_state(content["torch"])
    torch.cuda.set_rng_state(content["device"])
    get_cuda_rng_tracker().set_states(content["tracker"])
