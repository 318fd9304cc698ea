"""Distributed checkpoints that are there completely or not at all.

A checkpoint is a folder `step_<number>` written by Megatron-core's `dist_checkpointing`, with `state.json` and, last,
`manifest.json`: the size and SHA-256 of every file. It is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from m1.errors import M1Error, UsageError
from m1.profile import Model, Parallel
from m1.stage import write_json

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


def save(folder: Path, model: Any, optimizer: Any, state: dict[str, Any]) -> Path:
    """Write `folder`; every rank takes part. An existing folder of that name is replaced.

    Raises:
        M1Error: the disk is full or not writable; nothing that looks complete is left.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    main = torch.distributed.get_rank() == 0
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    torch.distributed.barrier()
    # Megatron makes a manager process for the writers' results, which costs seconds; a save that waits needs none.
    filesystem_async._results_queue = queue.Queue()
    try:
        with _quiet():
            dist_checkpointing.save(_sharded_state(model, optimizer, is_loading=False), str(unfinished))
        if main:
            write_json(unfinished / "state.json", state)
            write_json(unfinished / MANIFEST, _manifest(unfinished))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
    except OSError as error:
        raise M1Error(f"checkpoint {folder} could not be written: {error}", "Free disk space and rerun.") from error
    torch.distributed.barrier()
    return folder


def load(folder: Path, model: Any, optimizer: Any | None) -> dict[str, Any]:
    """Load `folder` into the model, and into the optimizer if one is given; returns the saved state.

    Raises:
        UsageError: the checkpoint is not complete or a file of it is damaged.
    """
    from megatron.core import dist_checkpointing

    verify(folder)
    with _quiet():
        loaded = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(folder))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counters(optimizer)
    return json.loads((folder / "state.json").read_text())


def load_model(folder: Path, settings: Model, parallel: Parallel) -> Any:
    """The model of a checkpoint alone, in evaluation mode, with its RoPE base set."""
    from m1.model.hybrid import build_model

    model = build_model(settings, parallel, seed=0)
    state = load(folder, model, None)
    model.set_rotary_base(state["rotary_base"])
    return model.eval()


def verify(folder: Path) -> None:
    """Raise UsageError unless every file of the checkpoint is as its manifest says."""
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is not a complete checkpoint: no {MANIFEST}", "Name another, or rerun its stage.")
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or _hash(file) != expected["sha256"]:
            raise UsageError(f"checkpoint {folder} is damaged: {name}", "Remove it; the previous one is used instead.")


def newest(folder: Path) -> Path | None:
    """The undamaged checkpoint with the highest step below `folder`, or None; damaged ones are named and skipped."""
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        try:
            verify(candidate)
        except UsageError as error:
            log.warning("%s", error)
            continue
        return candidate
    return None


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints below `folder` (rank 0)."""
    if torch.distributed.get_rank() == 0:
        for old in sorted(folder.glob("step_*"))[:-count]:
            shutil.rmtree(old)


def _sharded_state(model: Any, optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        _materialise_states(optimizer)
        sharded = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
        return {"model": state["model"], "optimizer": sharded}
    return state


def _optimizers(optimizer: Any) -> list[Any]:
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def _materialise_states(optimizer: Any) -> None:
    """Give a fresh AdamW the state tensors that saving and loading expect to be there."""
    for adam in _optimizers(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter not in adam.state or not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _separate_step_counters(optimizer: Any) -> None:
    """Megatron loads one step tensor into every parameter; AdamW would advance it once per parameter."""
    for adam in _optimizers(optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in files}


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Any:
    """Megatron's checkpoint code warns about its own defaults on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
