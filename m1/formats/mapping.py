"""Tensors of the two exported layouts (`m1.formats.layouts`) made from Megatron's one at a time, and back.

Nothing here holds a model: a source gives one whole Megatron parameter by its name, a folder gives one tensor or a part
of it. On meta tensors the same code tells names, shapes and bytes of an export without any weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from m1.config.export import Export
from m1.config.model import Model
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.formats import convert
from m1.formats.folder import Base
from m1.formats.layouts import MINIMAX_M1

#: Name of a parameter, its layer and expert counted over all ranks -> the whole parameter.
Source = Callable[[str], Tensor]
#: Name of a stored tensor, rows, columns -> that part of it.
Reader = Callable[[str, slice, slice], Tensor]

ALL = slice(None)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FUSED = "self_attention.linear_qkv.weight"
#: Which dimension tensor parallelism cuts, by the end of the name; what is not here is whole on every rank.
_ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    "qkv_proj.weight",
    "output_gate.weight",
    "attention.norm.weight",
)
_COLUMNS = ("out_proj.weight", "linear_proj.weight")


@dataclass(frozen=True)
class Form:
    """How an export writes weights: the layout, and the precision of the head ("fp32" or "bf16") and of the rest.

    The router is float32 always, as in the released checkpoint.
    """

    layout: str
    precision: str
    head_precision: str = "fp32"

    @classmethod
    def of(cls, settings: Profile) -> Form:
        part = settings.section("export", Export)
        return cls(part.layout, settings.parallel.precision, part.head_precision)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor `name`, by its stored or its Megatron name."""
        if name.endswith(("block_sparse_moe.gate.weight", "mlp.router.weight")):
            return torch.float32
        return _DTYPES[self.head_precision if name in ("lm_head.weight", "output_layer.weight") else self.precision]


# --- names and shapes -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def trained_shapes(model: Model) -> Mapping[str, tuple[int, ...]]:
    """Every parameter of the Megatron hybrid, by its name on a single rank, in the order of the layers."""
    hidden, width, ffn = model.hidden_size, model.num_attention_heads * model.head_dim, model.moe_ffn_hidden_size
    of_layer = {"input_layernorm.weight": (hidden,), "pre_mlp_layernorm.weight": (hidden,)}
    softmax = {
        _FUSED: (width + 2 * model.num_query_groups * model.head_dim, hidden),
        "self_attention.linear_proj.weight": (hidden, width),
    }
    lightning = {
        "self_attention.qkv_proj.weight": (3 * width, hidden),
        "self_attention.output_gate.weight": (width, hidden),
        "self_attention.norm.weight": (width,),
        "self_attention.out_proj.weight": (hidden, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        parts = of_layer | (softmax if model.is_softmax_layer(layer) else lightning)
        parts |= {"mlp.router.weight": (model.num_experts, hidden)}
        for expert in range(model.num_experts):
            parts[convert.expert_name(expert, "linear_fc1")] = (2 * ffn, hidden)
            parts[convert.expert_name(expert, "linear_fc2")] = (hidden, ffn)
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes | {"decoder.final_layernorm.weight": (hidden,), "output_layer.weight": (model.vocab_size, hidden)}


def exported(model: Model, form: Form) -> dict[str, Tensor]:
    """Every tensor of an export as a meta tensor: name, shape and dtype, from the mapping that writes it."""
    shapes = trained_shapes(model)
    return {
        name: tensor.to(form.dtype(name))
        for name, tensor in stored(lambda name: torch.empty(shapes[name], device="meta"), model, form.layout)
    }


def exported_bytes(model: Model, form: Form) -> int:
    """Bytes of all tensors of an export: 912,210,767,872 for MiniMax-M1 in its own layout with the head in bfloat16."""
    return sum(tensor.nbytes for tensor in exported(model, form).values())


# --- Megatron to stored ---------------------------------------------------------------------------------------------


def stored(source: Source, model: Model, layout: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the layout with its name, layer by layer; each may be a view of what `source` gave."""
    yield convert.WHOLE["embedding.word_embeddings.weight"], source("embedding.word_embeddings.weight")
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for old, new in _plain(model, layer).items():
            yield theirs + new, source(ours + old)
        if model.is_softmax_layer(layer):
            parts = convert.split_qkv(source(ours + _FUSED), model, _order(model, layout))
            for name, weight in zip("qkv", parts):
                yield f"{theirs}self_attn.{name}_proj.weight", weight
        for expert in range(model.num_experts):
            gate, up = source(ours + convert.expert_name(expert, "linear_fc1")).chunk(2)
            down = source(ours + convert.expert_name(expert, "linear_fc2"))
            for name, weight in (("w1", gate), ("w2", down), ("w3", up)):
                yield f"{theirs}block_sparse_moe.experts.{expert}.{name}.weight", weight
    for old in ("decoder.final_layernorm.weight", "output_layer.weight"):
        yield convert.WHOLE[old], source(old)


# --- stored to Megatron ---------------------------------------------------------------------------------------------


def trained(read: Reader, name: str, model: Model, layout: str, rank: int = 0, ranks: int = 1) -> Tensor:
    """The Megatron parameter `name`, or the part of it that one of `ranks` tensor-parallel ranks holds.

    Args:
        name: with layer and expert counted over all ranks.
        rank, ranks: place in the tensor-parallel group, for an expert in the expert-tensor-parallel group.
    """
    if name in convert.WHOLE:
        return _cut(read, convert.WHOLE[name], name, model, rank, ranks)
    _, _, number, rest = name.split(".", 3)
    prefix = f"model.layers.{number}."
    if rest == _FUSED:
        return _fused(read, f"{prefix}self_attn.", model, layout, rank, ranks)
    if rest.startswith("mlp.experts."):
        expert, matrix = rest.split(".")[3:5]
        experts = f"{prefix}block_sparse_moe.experts.{expert}."
        part = _part(model.moe_ffn_hidden_size, rank, ranks)
        if matrix == "linear_fc2":
            return read(f"{experts}w2.weight", ALL, part)
        # Gate and up are cut one by one.
        return torch.cat([read(f"{experts}{half}.weight", part, ALL) for half in ("w1", "w3")])
    return _cut(read, prefix + _plain(model, int(number))[rest], name, model, rank, ranks)


def _cut(read: Reader, target: str, name: str, model: Model, rank: int, ranks: int) -> Tensor:
    shape = trained_shapes(model)[name]
    if name.endswith(_COLUMNS):
        return read(target, ALL, _part(shape[1], rank, ranks))
    return read(target, _part(shape[0], rank, ranks) if name.endswith(_ROWS) else ALL, ALL)


def _fused(read: Reader, prefix: str, model: Model, layout: str, rank: int, ranks: int) -> Tensor:
    heads, groups = (
        _part(count * model.head_dim, rank, ranks) for count in (model.num_attention_heads, model.num_query_groups)
    )
    q, k, v = (
        read(f"{prefix}{part}_proj.weight", rows, ALL) for part, rows in (("q", heads), ("k", groups), ("v", groups))
    )
    return convert.fuse_qkv(q, k, v, model, _order(model, layout))


def _part(size: int, rank: int, ranks: int) -> slice:
    return slice(size * rank // ranks, size * (rank + 1) // ranks) if ranks > 1 else ALL


def _plain(model: Model, layer: int) -> dict[str, str]:
    """As transformers names them in memory, but for the router."""
    return convert.plain_names(model, layer) | {"mlp.router.weight": "block_sparse_moe.gate.weight"}


def _order(model: Model, layout: str) -> Tensor:
    """Channels of a stored query or key head. The released code rotates the first channels, as training does."""
    return torch.arange(model.head_dim) if layout == MINIMAX_M1 else convert.rotary_order(model)


# --- reading a folder -----------------------------------------------------------------------------------------------


class FolderReader:
    """Tensors of a base model's folder, or rows and columns of them; a few files are open at a time, none is mapped.

    transformers can also save its own names (`mlp.gate.weight`, the experts of a layer stacked in
    `mlp.experts.gate_up_proj` and `down_proj`); those are read as if they had the released names.

    Raises:
        UsageError: a tensor is missing, unknown or of another shape than the model's settings say.
    """

    _KEPT_OPEN = 2

    def __init__(self, base: Base, model: Model) -> None:
        self.base, self.model = base, model
        self._open: dict[Path, Any] = {}
        self._check()

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.clear()

    def __call__(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        if name in self.base.tensors:
            found = self._slice(name)
            return found[rows] if len(self.base.tensors[name].shape) == 1 else found[rows, columns]
        place, expert, half = self._elsewhere(name)
        if expert is None:
            return self._slice(place)[rows, columns]
        if half is not None:  # w1 are the first rows of the expert's matrix, w3 the second
            start, stop, _ = rows.indices(self.model.moe_ffn_hidden_size)
            first = half * self.model.moe_ffn_hidden_size
            rows = slice(first + start, first + stop)
        return self._slice(place)[expert : expert + 1, rows, columns][0]

    def _slice(self, name: str) -> Any:
        file = self.base.tensors[name].file
        if file not in self._open:
            while len(self._open) >= self._KEPT_OPEN:
                self._open.pop(next(iter(self._open)))
            # Mapped pages would count as this process's memory until the system takes them back.
            self._open[file] = safe_open(file, framework="pt", backend="pread")
        return self._open[file].get_slice(name)

    def _elsewhere(self, name: str) -> tuple[str, int | None, int | None]:
        """Where transformers' own names keep a tensor: name, expert, and 0 or 1 for the half with w1 or w3."""
        if ".experts." not in name:
            return name.replace("block_sparse_moe", "mlp"), None, None
        prefix, rest = name.split(".block_sparse_moe.experts.")
        expert, matrix, _ = rest.split(".")
        if matrix == "w2":
            return f"{prefix}.mlp.experts.down_proj", int(expert), None
        return f"{prefix}.mlp.experts.gate_up_proj", int(expert), int(matrix == "w3")

    def _check(self) -> None:
        """Every tensor of the mapping is there in its shape, and no other."""
        count, ffn, hidden = self.model.num_experts, self.model.moe_ffn_hidden_size, self.model.hidden_size
        form = Form(self.base.layout, "fp32")
        wanted: dict[str, tuple[int, ...]] = {}
        for name, tensor in exported(self.model, form).items():
            if name in self.base.tensors:
                wanted[name] = tuple(tensor.shape)
                continue
            place, expert, half = self._elsewhere(name)
            stacked = (count, hidden, ffn) if half is None else (count, 2 * ffn, hidden)
            wanted[place] = tuple(tensor.shape) if expert is None else stacked
        found = {name: tensor.shape for name, tensor in self.base.tensors.items()}
        faults = [f"{name} is missing" for name in wanted if name not in found]
        faults += [f"{name} is not part of the model" for name in found if name not in wanted]
        faults += [
            f"{name} has shape {list(found[name])}, the model's is {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ]
        if faults:
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise UsageError(
                f"pretrain.init_from={self.base.folder}: {'; '.join(faults[:5])}{more}",
                "The weights are not those of its config.json; fetch the folder again.",
            )
