"""Model parameters of a distributed checkpoint, one at a time, without building the model that wrote it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem
import torch.distributed.checkpoint.metadata
import torch.distributed.checkpoint.planner
from torch import Tensor

from m1.errors import UsageError

_CHECKPOINT = "torch.distributed.checkpoint"
#: What the table of contents of torch.distributed.checkpoint is made of; unpickling may name nothing else.
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in (
        "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_CHECKPOINT}.planner", name) for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in ("Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8")),
}  # fmt: skip


class CheckpointTensors:
    """Reads whole parameters by name: `CheckpointTensors(folder)(name)`.

    Names are those of a model on a single rank; layers and experts count over all ranks, whatever layout wrote the
    checkpoint. Memory: the parameter, and the largest piece of it as it was written by one rank.

    Attributes:
        rotary_base: RoPE base of the model.

    Raises:
        UsageError: the folder is no such checkpoint, or its table of contents names what does not belong there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rotary_base = float(_state(folder)["rotary_base"])
        contents = _table_of_contents(folder)
        self._tensors = contents.state_dict_metadata
        self._pieces = contents.storage_data

    def __call__(self, name: str) -> Tensor:
        key, expert = _key(name)
        described = self._tensors.get(key)
        if described is None or (expert is not None and expert >= described.size[0]):
            raise UsageError(
                f"checkpoint {self.folder} has no parameter {name}",
                "It belongs to another model: use the profile it was trained with.",
            )
        shape = described.size if expert is None else described.size[1:]
        whole, filled = torch.empty(shape, dtype=described.properties.dtype), 0
        for chunk in described.chunks:
            if expert is not None and not chunk.offsets[0] <= expert < chunk.offsets[0] + chunk.sizes[0]:
                continue
            piece, offsets = self._read(key, chunk.offsets), chunk.offsets
            if expert is not None:
                piece, offsets = piece[expert - offsets[0]], offsets[1:]
            at = tuple(slice(first, first + size) for first, size in zip(offsets, piece.shape))
            whole[at] = piece
            filled += piece.numel()
        if filled != whole.numel():
            raise UsageError(f"checkpoint {self.folder}: {name} is not complete", "Name another, or rerun its stage.")
        return whole

    def _read(self, key: str, offsets: torch.Size) -> Tensor:
        place = self._pieces[torch.distributed.checkpoint.metadata.MetadataIndex(key, offsets)]
        if Path(place.relative_path).name != place.relative_path:
            raise UsageError(f"checkpoint {self.folder} refers to {place.relative_path}, a file outside of it")
        with open(self.folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _table_of_contents(folder: Path) -> Any:
    try:
        with open(folder / ".metadata", "rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not a distributed checkpoint: no .metadata", "Name another.") from error
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UsageError(
            f"checkpoint {folder}: .metadata is not a table of contents: {error}", "Do not use this folder."
        ) from error


def _state(folder: Path) -> dict[str, Any]:
    if not (folder / "state.json").is_file():
        raise UsageError(f"{folder} is not a checkpoint: no state.json", "Name another, or rerun its stage.")
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _key(name: str) -> tuple[str, int | None]:
    """Key in the checkpoint, and the expert, where the experts of a layer are stacked under one key."""
    if ".local_experts." not in name:
        return name, None
    prefix, rest = name.split(".local_experts.")
    expert, matrix = rest.split(".", 1)
    return f"{prefix}.experts.{matrix}", int(expert)
