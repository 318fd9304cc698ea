"""What an exported folder holds: configuration, weights, tokenizer. Weights pass through one file's worth at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from m1.config.export import Export
from m1.config.model import Model
from m1.config.profile import Profile
from m1.errors import StageFailed, UsageError
from m1.files import unfinished, write_json
from m1.formats import convert, layouts
from m1.formats import mapping as stored
from m1.formats.folder import INDEX, SINGLE
from m1.formats.layouts import MINIMAX_M1
from m1.formats.mapping import Form, Source

#: Lets `AutoConfig`, and so vLLM, read the released layout's config.json, whose type transformers does not know. The
#: released checkpoint carries a file of this name too; this one holds no values, they are all in config.json.
_CONFIGURATION = '''\
"""Configuration of the released MiniMax-M1 layout: every value is in config.json."""

from transformers import PretrainedConfig


class MiniMaxM1Config(PretrainedConfig):
    model_type = "minimax_m1"
    keys_to_ignore_at_inference = ["past_key_values"]
'''


def write(folder: Path, source: Source, rotary_base: float, settings: Profile, tokenizer_folder: Path) -> int:
    """Write everything but the model card into the new `folder`; returns the bytes of all weights.

    Args:
        source: gives the whole parameter of the training model by its name.

    Raises:
        UsageError: the layout cannot represent the model, or the tokenizer does not fit it.
        StageFailed: the disk has no room for it.
    """
    form = Form.of(settings)
    layouts.require_representable(settings.model, form.layout, rotary_base)
    folder.mkdir(parents=True)
    for file in sorted(tokenizer_folder.iterdir()):
        if file.name != "summary.json":
            shutil.copyfile(file, folder / file.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None or len(tokenizer) != settings.model.vocab_size:
        raise UsageError(
            f"export: the tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens and end-of-sequence id "
            f"{tokenizer.eos_token_id}; the model has model.vocab_size={settings.model.vocab_size}",
            "Use the tokenizer that the model was trained with.",
        )
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_config(folder, settings.model, form, rotary_base, ids)
    # Sampling as in the evaluation of the MiniMax-M1 report, §6.
    sampling = dict(do_sample=True, temperature=1.0, top_p=0.95)
    GenerationConfig(**ids, pad_token_id=tokenizer.eos_token_id, **sampling).save_pretrained(folder)
    return write_weights(
        folder, source, settings.model, form, int(settings.section("export", Export).shard_gigabytes * 1e9)
    )


def write_weights(folder: Path, source: Source, model: Model, form: Form, shard_bytes: int) -> int:
    """Write the weights in files of at most `shard_bytes` (or one tensor, if that is larger); returns their bytes.

    One file is in memory at a time. Every file is complete once it has its name; of several, the index comes last.

    Raises:
        StageFailed: the disk is too small, or a weight is not a finite number.
    """
    sizes = {name: tensor.nbytes for name, tensor in stored.exported(model, form).items()}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if free < total:
        raise StageFailed(f"export: {folder} needs {total:,} bytes and its disk has {free:,} left", "Free disk space.")
    shards = split(sizes, shard_bytes)
    tensors = stored.stored(source, model, form.layout)
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content: dict[str, torch.Tensor] = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, f"{name} where {expected} belongs"
            # A copy: parts of one parameter, such as w1 and w3, share memory, which safetensors refuses.
            content[name] = tensor.detach().to(
                "cpu", form.dtype(name), copy=True, memory_format=torch.contiguous_format
            )
            del tensor
            if not bool(content[name].isfinite().all()):
                raise StageFailed(
                    f"export: {name} has values that are not finite",
                    "Nothing was exported. Look at the losses of the runs before; export one from before they went.",
                )
        with unfinished(folder / file) as temporary:
            save_file(content, temporary, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return total


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes; a larger tensor is alone in its group."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_config(folder: Path, model: Model, form: Form, rotary_base: float, ids: dict[str, Any]) -> None:
    """Write `config.json` and what reading it takes; `ids` are those of special tokens."""
    dtype = "bfloat16" if form.precision == "bf16" else "float32"
    if form.layout == MINIMAX_M1:
        (folder / "configuration_minimax_m1.py").write_text(_CONFIGURATION, encoding="utf-8")
        write_json(folder / "config.json", layouts.minimax_m1_config(model, rotary_base, dtype, **ids))
        return
    config = convert.transformers_config(model, rotary_base, architectures=["MiniMaxForCausalLM"], dtype=dtype, **ids)
    config.save_pretrained(folder)


def rotary_note(model: Model, layout: str, rotary_base: float) -> str:
    """Which rotary convention was written, and why, in a few sentences."""
    rope = layouts.rope_parameters(model, rotary_base)
    rotated, part = layouts.rotary_dim(model), f"{layouts.rotary_dim(model) / model.head_dim:g}"
    if layout == MINIMAX_M1:
        return (
            f"The released layout says how many channels of a softmax head are rotated: rotary_dim {rotated} of "
            f"{model.head_dim}, rope_theta {rotary_base:g}, channel i paired with i + {rotated // 2}. Training pairs "
            "the same channels, so the rows of queries and keys are in the order they were trained in. "
            "transformers' own `minimax` family does not read rotary_dim: export.layout transformers is for it."
        )
    if rope["rope_type"] == "default":
        return f"RoPE covers the whole head, base {rotary_base:g}, as transformers' `minimax` family has it."
    return (
        f"The model rotates {part} of each softmax head with RoPE base {rotary_base:g}; "
        "transformers' `minimax` family rotates whole heads and reads no rotary_dim. It is therefore written with "
        f'rope_type "proportional", partial_rotary_factor {part} and rope_theta {rope["rope_theta"]:g} (the base to '
        "the power of one over that factor), and the channels of queries and keys are reordered to match: the same "
        "function, in another notation."
    )
