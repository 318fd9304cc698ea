"""Distributed checkpoints that are there completely or not at all.

A checkpoint is a folder `step_<number>`: shards and metadata by Megatron-core's `dist_checkpointing` (model and
optimizer, readable at any parallel layout), the random generators of every rank, `state.json` (step, data position,
what else the stage keeps) and, last, `manifest.json`: the size and SHA-256 of every file. It is written under a
temporary name, by processes beside the training, and renamed when complete.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import pickle
import queue
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint import CheckpointException

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.errors import M1Error, UsageError
from m1.files import write_json
from m1.training import random_state

MANIFEST = "manifest.json"
STATE = "state.json"
#: Fields of the model that fix the shapes of its weights.
_SHAPE = ("num_layers", "softmax_every", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim",
          "num_experts", "moe_ffn_hidden_size", "vocab_size")  # fmt: skip
_REMAKE = "Make it again: rerun its stage with --force. Or name another run with --upstream."
log = logging.getLogger(__name__)


class Writer:
    """Writes checkpoints, one at a time, while the training goes on. All ranks call every method at the same point."""

    def __init__(self) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._calls = AsyncCallsQueue(persistent=False)
        #: The checkpoint being written, None when there is none.
        self.folder: Path | None = None

    def begin(self, folder: Path, model: Any, optimizer: Any | None, state: dict[str, Any]) -> None:
        """Take the state as it is now; from here on the training may change it. One checkpoint at a time.

        Forked processes see the memory of this moment and write it, whatever the training does to it meanwhile.

        Raises:
            M1Error: the disk is full or not writable; nothing that looks complete is left.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        assert self.folder is None, "an earlier checkpoint is still being written"
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        rank = torch.distributed.get_rank()
        with _shared_failure(folder):
            if rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                write_json(unfinished / STATE, {**state, "layout": layout(), "model": _shape(model)})
        with _failure_named(folder), _quiet():
            random_state.write(unfinished)
            # Megatron's own queue needs a manager process, which costs seconds to start and dies of SIGTERM.
            filesystem_async._results_queue = _ResultFile(unfinished / f".results_{rank}")
            sharded = _sharded_state(model, optimizer, is_loading=False)
            request = dist_checkpointing.save(sharded, str(unfinished), async_sharded_save=True)
            filesystem_async._results_queue = None
            if request.async_fn is not None:
                hashes = unfinished / f"hashes_{rank:05d}.json"
                request = request._replace(async_fn=functools.partial(_write_and_hash, request.async_fn, hashes))
            request.add_finalize_fn(functools.partial(_complete, unfinished, folder))
            self._calls.schedule_async_request(request)
        self.folder = folder

    def poll(self) -> Path | None:
        """The checkpoint that has become complete since the last call, or None. Costs nothing while none is written."""
        return self._finalize(blocking=False)

    def wait(self) -> Path | None:
        """As `poll`, but waits for a checkpoint that is being written."""
        return self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> Path | None:
        if self.folder is None:
            return None
        with _failure_named(self.folder), _quiet():
            try:
                finished = self._calls.maybe_finalize_async_calls(blocking=blocking)
            except BaseException:
                self.folder = None
                raise
        if not finished:
            return None
        folder, self.folder = self.folder, None
        return folder


def save(folder: Path, model: Any, optimizer: Any | None, state: dict[str, Any]) -> Path:
    """Write `folder` and wait until it is complete; every rank takes part. A folder of that name is replaced.

    Raises:
        M1Error: the disk is full or not writable; nothing that looks complete is left.
    """
    writer = Writer()
    writer.begin(folder, model, optimizer, state)
    writer.wait()
    return folder


def load(folder: Path, model: Any, optimizer: Any | None, *, verified: bool = False) -> dict[str, Any]:
    """Load `folder`, saved at any layout, into the model, and into the optimizer if one is given.

    With an optimizer the random generators go on as well, at the layout it was saved at; other ranks than those that
    saved have no generator to go on with, and keep their own.

    Args:
        verified: the files have been compared with the manifest already.

    Returns:
        The saved state.

    Raises:
        UsageError: the checkpoint is not complete, a file of it is damaged, or it holds another model.
    """
    from megatron.core import dist_checkpointing

    if not verified:
        verify(folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _require_same_model(folder, state, model)
    with _quiet():
        loaded = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(folder))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counters(optimizer)
        if state["layout"] == layout():
            random_state.restore(folder)
    return state


def load_model(folder: Path, settings: Model, parallel: Parallel) -> Any:
    """The model of a checkpoint alone, in evaluation mode, with its RoPE base set."""
    from m1.model.hybrid import build_model

    model = build_model(settings, parallel, seed=0)
    state = load(folder, model, None)
    model.set_rotary_base(state["rotary_base"])
    return model.eval()


def layout() -> dict[str, int]:
    """Parallel sizes of the running process groups."""
    from megatron.core import parallel_state

    return {
        "world_size": torch.distributed.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


# -------------------------------------------------------------------------------------------------------- whole or not


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Every checkpoint below `folder`, whole or not, in order of its step."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))


def newest(folder: Path) -> Path | None:
    """The undamaged checkpoint with the highest step below `folder`, or None; damaged ones are named and skipped.

    In a process group every rank calls it, and all find the same.
    """
    for candidate in reversed(step_folders(folder)):
        fault = damage(candidate)
        if fault is None:
            return candidate
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            log.warning("checkpoint %s is damaged (%s) and skipped; the one before it is used", candidate, fault)
    return None


def verify(folder: Path) -> None:
    """Raise UsageError unless every file of the checkpoint is as its manifest says."""
    fault = damage(folder)
    if fault is not None:
        raise UsageError(f"checkpoint {folder} is damaged: {fault}", _REMAKE)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. In a process group every rank checks a part, and all get one answer."""
    if not torch.distributed.is_initialized():
        return _fault(folder, 0, 1)
    world = torch.distributed.get_world_size()
    found: list[str | None] = [None] * world
    torch.distributed.all_gather_object(found, _fault(folder, torch.distributed.get_rank(), world))
    return next((fault for fault in found if fault is not None), None)


def _fault(folder: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with every `ranks`-th file, the largest first."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        for name in names[rank::ranks]:
            expected, file = files[name], folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes in place of {expected['bytes']}"
            if _hash(file) != expected["sha256"]:
                return f"the SHA-256 of {name} is not that of the manifest"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was never complete"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def remove(folder: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for one."""
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed. One process calls it, while none saves."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------------- writing


class _ResultFile:
    """What the writing process reports, as a file: Megatron puts it there and gets it after the process has ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def put(self, results: Any) -> None:
        self.file.write_bytes(pickle.dumps(results))

    def get_nowait(self) -> Any:
        if not self.file.is_file():
            raise queue.Empty
        results = pickle.loads(self.file.read_bytes())  # by the child of this process, moments ago
        self.file.unlink()
        return results


def _write_and_hash(write: Callable[..., None], hashes: Path, rank: int, buckets: list[Any], results: Any) -> None:
    """What the writing process of a rank does. SIGTERM is the training's business: it waits for this checkpoint."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # the threads of the OpenMP pool did not survive the fork
    write(rank, buckets, results)
    written = [Path(bucket[0]) for bucket in buckets]
    write_json(hashes, {file.name: _entry(file) for file in written if file.is_file()})


def _complete(unfinished: Path, folder: Path) -> None:
    """Write the manifest and give the checkpoint its name, once the shards of all ranks are there."""
    with _shared_failure(folder):
        if torch.distributed.get_rank() != 0:
            return
        files: dict[str, dict[str, Any]] = {}
        for part in sorted(unfinished.glob("hashes_*.json")):
            files |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        for file in sorted(path for path in unfinished.rglob("*") if path.is_file()):
            name = str(file.relative_to(unfinished))
            if name not in files:
                _sync(file)
                files[name] = _entry(file)
        write_json(unfinished / MANIFEST, {"format": 1, "files": files})
        _sync(unfinished)
        if folder.exists():
            remove(folder)
        os.replace(unfinished, folder)
        _sync(folder.parent)


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _hash(file)}


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Onto the disk, so that a power failure cannot leave the name without the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _shared_failure(folder: Path) -> Iterator[None]:
    """What rank 0 does alone: a failure of its file system is an error on all ranks, none waits for the others."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    failed = torch.tensor([int(failure is not None)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(failed)
    if failed.item():
        raise _not_written(folder, failure or "rank 0 has failed") from failure


@contextlib.contextmanager
def _failure_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:  # the last is no Exception, but a BaseException
        raise _not_written(folder, error) from error


def _not_written(folder: Path, cause: Any) -> M1Error:
    return M1Error(f"checkpoint {folder} could not be written: {cause}", "Free disk space and rerun.")


# ------------------------------------------------------------------------------------------------------ sharded content


def _shape(model: Any) -> dict[str, int]:
    return {name: getattr(model.settings, name) for name in _SHAPE}


def _require_same_model(folder: Path, state: dict[str, Any], model: Any) -> None:
    ours = _shape(model)
    different = [f"{name} {value}, not {ours[name]}" for name, value in state["model"].items() if value != ours[name]]
    if different:
        raise UsageError(
            f"checkpoint {folder} holds another model than the profile's: {', '.join(different)}",
            "Set the profile's model section to these values, or name another run.",
        )


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron's checkpoint code warns about its own defaults on every call, and collects garbage several times.

    With some 10^6 objects imported that is most of the time it takes; frozen, they are not looked at.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
