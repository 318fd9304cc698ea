"""What a folder in one of the exported layouts holds, read from its configuration and headers: no torch, no weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m1.config.model import Model
from m1.errors import UsageError
from m1.formats import vocabulary
from m1.formats.layouts import (
    FACTORS,
    FIELDS,
    MINIMAX_M1,
    NAMES,
    TRANSFORMERS,
    rope_parameters,
    rotary_dim,
    unrepresentable,
)
from m1.rows import parse, read_json, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Computed from the configuration, whatever a file says: decay tables of transformers, RoPE frequencies of old files.
COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = ("F32", "BF16", "F16")
_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies. `dtype` as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Base:
    """A base model on disk whose configuration is that of the profile.

    Attributes:
        layout: "transformers" or "minimax-m1".
        tensors: every tensor of the folder by name, those in COMPUTED left out.
        digest: SHA-256 over config.json, the index, and the name, size and header of every weight file.
        notes: what differs without changing the function, one sentence each.
    """

    folder: Path
    layout: str
    tensors: dict[str, Stored]
    digest: str
    notes: tuple[str, ...] = ()


def inspect(folder: Path, model: Model, tokenizer: Path | None = None) -> Base:
    """Check that `folder` holds the profile's model and can be read; reads configuration and headers, no weights.

    Args:
        tokenizer: folder of the tokenizer that the profile's data was made with.

    Raises:
        UsageError: no such folder, not safetensors, damaged, in no known layout, or another model: every difference.
    """
    where = f"pretrain.init_from={folder}"
    if not (folder / "config.json").is_file():
        raise UsageError(f"{where}: no config.json there", "Name the folder of a downloaded or exported model.")
    config = _json(folder / "config.json", where)
    layout = _layout(config, where)
    faults, notes = compare(config, layout, model)
    if tokenizer is not None and (fault := vocabulary.difference(folder, tokenizer)):
        faults.append(fault)
    if faults:
        raise UsageError(
            f"{where} ({layout} layout) is not the model of the profile: {'; '.join(faults)}",
            "Give the profile's model section the values of the base model, or name another folder.",
        )
    found = open_folder(folder)
    for name, stored in found.tensors.items():
        if stored.dtype not in _FLOATS:
            raise UsageError(
                f"{where}: {name} has dtype {stored.dtype}, from which the trained weight cannot be told",
                f"Name a folder with weights in {', '.join(_FLOATS)}; a quantised model is not one.",
            )
    return replace(found, notes=tuple(notes))


def open_folder(folder: Path) -> Base:
    """What a folder in one of the layouts holds, whatever model that is.

    Raises:
        UsageError: not safetensors, damaged, or in no known layout.
    """
    where = f"pretrain.init_from={folder}"
    layout = _layout(_json(folder / "config.json", where), where)
    files, placed = _weight_files(folder, where)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if (folder / INDEX).is_file():
        digest.update((folder / INDEX).read_bytes())
    tensors: dict[str, Stored] = {}
    unnamed: dict[str, str] = {}
    for file in files:
        header, found = _header(file, where)
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + hashlib.sha256(header).digest())
        if placed is None:
            tensors |= found
        else:
            tensors |= {name: stored for name, stored in found.items() if placed.get(name) == file.name}
            unnamed |= {name: file.name for name in found.keys() - placed.keys()}
    if placed is not None:
        _check_index(where, placed, tensors, unnamed)
    if not tensors:
        raise UsageError(f"{where}: {files[0].name} holds no tensor", "Fetch the folder again.")
    tensors = {name: stored for name, stored in tensors.items() if not name.endswith(COMPUTED)}
    return Base(folder, layout, tensors, digest.hexdigest())


def _check_index(
    where: str, placed: Mapping[str, str], tensors: Mapping[str, Stored], unnamed: Mapping[str, str]
) -> None:
    """Every tensor is in the file that the index names, and the index names every tensor.

    Raises:
        UsageError: a tensor is elsewhere or nowhere, or not in the index.
    """
    faults = [f"{name} is not in {file}, where {INDEX} puts it" for name, file in placed.items() if name not in tensors]
    faults += [f"{name} in {file} is not in {INDEX}" for name, file in unnamed.items() if not name.endswith(COMPUTED)]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UsageError(f"{where}: {'; '.join(faults[:3])}{more}", "Fetch the index and the weights of one revision.")


def compare(config: dict[str, Any], layout: str, model: Model) -> tuple[list[str], list[str]]:
    """Differences between `config.json` and the profile's model section that change the function, and harmless ones."""
    faults = unrepresentable(model, layout)
    for field, key in FIELDS.items():
        ours, theirs = getattr(model, field), config.get(key)
        if theirs != ours:
            faults.append(f"model.{field} is {ours}, config.json has {_said(key, theirs)}")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    dim = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    if dim != model.head_dim:
        faults.append(f"model.head_dim is {model.head_dim}, config.json has {_said('head_dim', dim)}")
    faults += _pattern_faults(config, layout, model)
    for name in FACTORS[layout]:
        for kind, ours in (("alpha", model.deepnorm_alpha), ("beta", 1.0)):
            theirs = config.get(name % kind)
            if not isinstance(theirs, (int, float)) or not math.isclose(theirs, ours, rel_tol=1e-12):
                faults.append(f"the profile's depth gives {kind} {ours}, config.json has {_said(name % kind, theirs)}")
    faults += _fixed_faults(config, layout)
    rotary = _transformers_rotary_faults if layout == TRANSFORMERS else _released_rotary_faults
    faults += rotary(config, model)
    notes = []
    longest = config.get("max_position_embeddings")
    if longest != model.max_position_embeddings:
        notes.append(
            f"The base model's {_said('max_position_embeddings', longest)} became the profile's "
            f"{model.max_position_embeddings}: a limit on lengths, on which no weight and no angle depends."
        )
    return faults, notes


def _pattern_faults(config: dict[str, Any], layout: str, model: Model) -> list[str]:
    key = "layer_types" if layout == TRANSFORMERS else "attn_type_list"
    kinds = ("linear_attention", "full_attention") if layout == TRANSFORMERS else (0, 1)
    ours = [kinds[model.is_softmax_layer(layer)] for layer in range(model.num_layers)]
    theirs = config.get(key)
    if theirs == ours:
        return []
    if not isinstance(theirs, list) or any(kind not in kinds for kind in theirs):
        return [f"config.json has {_said(key, theirs)}, not a list of {kinds[0]!r} and {kinds[1]!r}"]
    softmax = [layer for layer, kind in enumerate(theirs) if kind == kinds[1]]
    return [
        f"model.softmax_every={model.softmax_every} puts softmax attention in layers "
        f"{_few([i for i, kind in enumerate(ours) if kind == kinds[1]])} of {model.num_layers}, {key} in "
        f"{_few(softmax)} of {len(theirs)}"
    ]


def _fixed_faults(config: dict[str, Any], layout: str) -> list[str]:
    """Settings with one value that this project's model has."""
    shared = config.get("shared_intermediate_size", 0)
    allowed: list[tuple[str, bool, str]] = [
        ("hidden_act", config.get("hidden_act", "silu") == "silu", "experts here use silu"),
        ("tie_word_embeddings", not config.get("tie_word_embeddings"), "embedding and LM head are apart here"),
        ("sliding_window", config.get("sliding_window") is None, "softmax attention here sees the whole sequence"),
        ("rope_scaling", config.get("rope_scaling") in (None, {}), "RoPE here is not scaled"),
        ("quantization_config", not config.get("quantization_config"), "quantised weights are not trained on"),
    ]
    if layout == MINIMAX_M1:
        allowed += [
            ("postnorm", config.get("postnorm") is True, "the residual here is the normed value"),
            ("shared_intermediate_size", not any(shared if isinstance(shared, list) else [shared]), "no shared expert"),
        ]
    return [f"config.json has {_said(key, config.get(key))}: {why}" for key, holds, why in allowed if not holds]


def _transformers_rotary_faults(config: dict[str, Any], model: Model) -> list[str]:
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_parameters") or {})}
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    ours = f"model.rotary_percent={model.rotary_percent} with rotary_base={model.rotary_base!r}"
    named = config.get("rotary_dim", model.head_dim)
    if kind == "default" and named != model.head_dim:
        return [
            f"config.json has rotary_dim={named}, but transformers' `minimax` does not read it and rotates "
            "whole heads: it does not tell which of the two the weights were trained with; the released layout does"
        ]
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind == "default" and partial != 1.0:
        return [f"config.json has partial_rotary_factor={partial}, which transformers' `minimax` does not read"]
    if kind not in ("default", "proportional") or rope.get("factor", 1.0) != 1.0:
        return [f"config.json has rope_parameters={json.dumps(rope)}, a scaling that the model here does not know"]
    wanted = rope_parameters(model, model.rotary_base)
    if (kind, theta) == (wanted["rope_type"], wanted["rope_theta"]) and partial == wanted.get(
        "partial_rotary_factor", 1.0
    ):
        return []
    base = theta**partial if theta else None
    return [
        f"{ours}; config.json rotates {partial:g} of a head with {_said('rope_theta', theta)}, which is a base of "
        f"{base!r}"
    ]


def _released_rotary_faults(config: dict[str, Any], model: Model) -> list[str]:
    faults, rotated = [], config.get("rotary_dim", config.get("head_dim"))
    if rotated != rotary_dim(model):
        faults.append(
            f"model.rotary_percent={model.rotary_percent} rotates {rotary_dim(model)} channels of a head, config.json "
            f"has {_said('rotary_dim', rotated)}"
        )
    if config.get("rope_theta") != model.rotary_base:
        faults.append(
            f"model.rotary_base is {model.rotary_base!r}, config.json has "
            f"{_said('rope_theta', config.get('rope_theta'))}"
        )
    return faults


def _said(key: str, value: Any) -> str:
    return f"no {key}" if value is None else f"{key}={value!r}"


def _few(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:6]))
    return f"{text}, ..." if len(numbers) > 6 else text or "none"


def _layout(config: dict[str, Any], where: str) -> str:
    names = [*(config.get("architectures") or []), config.get("model_type")]
    found = {NAMES[name] for name in names if name in NAMES}
    if len(found) != 1:
        raise UsageError(
            f"{where}: architectures {config.get('architectures')} with model_type {config.get('model_type')!r} is no "
            "layout known here",
            f"Known are {', '.join(NAMES)}.",
        )
    return found.pop()


def _weight_files(folder: Path, where: str) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder; where it has an index, those it names, and the file of every tensor."""
    placed = _index(folder, where) if (folder / INDEX).is_file() else None
    names = [SINGLE] if placed is None else sorted(set(placed.values()))
    if SINGLE not in names and (folder / SINGLE).is_file():
        raise UsageError(
            f"{where}: {SINGLE} is there and {INDEX}, which names other files; programs differ in which they read",
            "Remove the one that is not the model's.",
        )
    if not (folder / names[0]).is_file() and len(names) == 1 and (found := _pickled(folder)):
        raise UsageError(
            f"{where}: weights are pickled ({found}); reading them could run any program",
            "Name a folder with safetensors: most models have one, or convert where you trust the file "
            "(`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`).",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{where}: not there: {', '.join(missing[:5])}", "Fetch the folder again, completely.")
    return [folder / name for name in names], placed


def _index(folder: Path, where: str) -> dict[str, str]:
    """Tensor -> name of its file, as the index says."""
    placed = _json(folder / INDEX, where).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        found = "an empty weight_map" if placed == {} else f"weight_map={shown(placed)}"
        raise UsageError(f"{where}: {INDEX} has {found}, so it names no files", "Fetch the folder again.")
    for name in placed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{where}: {INDEX} names {shown(name)}", "Fetch the folder again.")
    return placed


def _pickled(folder: Path) -> str:
    return ", ".join(file.name for pattern in _PICKLED for file in sorted(folder.glob(pattern))[:2])


def _header(file: Path, where: str) -> tuple[bytes, dict[str, Stored]]:
    """Header of a safetensors file and what it says, without reading any weight."""
    damaged = UsageError(f"{where}: {file.name} is damaged or cut short", "Fetch the file again.")
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= _MAX_HEADER else b""
    try:
        content = parse(header.decode("utf-8"))
        content.pop("__metadata__", None)
        found = {name: Stored(file, str(entry["dtype"]), _shape(entry["shape"])) for name, entry in content.items()}
        parts = sorted(_shape(entry["data_offsets"]) for entry in content.values())
        ends = [0, *(end for _, end in parts)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    # The parts stand one after the other and fill the file.
    if file.stat().st_size != 8 + length + ends[-1] or [begin for begin, _ in parts] != ends[:-1]:
        raise damaged
    return header, found


def _shape(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not a list of sizes")
    return tuple(numbers)


def _json(file: Path, where: str) -> dict[str, Any]:
    try:
        content = read_json(file)
    except UsageError as error:
        raise UsageError(f"{where}: {file.name} cannot be read: {error.what}", "Fetch the file again.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where}: {file.name} is not a JSON object", "Fetch the file again.")
    return content
