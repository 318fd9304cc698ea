"""What an exported folder holds: configuration, weights, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, MiniMaxForCausalLM

from m1 import arithmetic
from m1.errors import StageFailed, UsageError
from m1.model import convert
from m1.model.hybrid import HybridModel
from m1.profile import Model, Profile

#: Larger models are written in several files of at most this size.
SHARD_SIZE = "5GB"


def write(folder: Path, trained: HybridModel, settings: Profile, tokenizer_folder: Path) -> int:
    """Write everything but the model card into the new `folder`; returns the bytes of all weights.

    The weights are named as in the released MiniMax-Text-01 checkpoint (one matrix per expert, `block_sparse_moe`),
    which is what transformers itself writes and reads for this family.

    Raises:
        UsageError: transformers cannot represent the model, or the tokenizer does not fit it.
        StageFailed: the weights written are not as many as the model has.
    """
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
    config = convert.transformers_config(settings.model, trained.rotary_base, **ids)
    weights = stored(convert.to_transformers(trained.state_dict(), settings.model), settings.parallel.precision)
    with torch.device("meta"):
        model = MiniMaxForCausalLM(config)
    outcome = model.load_state_dict(weights, strict=False, assign=True)
    unexplained = [name for name in outcome.missing_keys if not name.endswith(convert.DECAY_TABLES)]
    if outcome.unexpected_keys or unexplained:
        raise StageFailed(f"export: weights do not fit transformers: {(outcome.unexpected_keys + unexplained)[:3]}")
    # Sampling as in the evaluation of the MiniMax-M1 report, §6.
    model.generation_config = GenerationConfig(
        **ids, pad_token_id=tokenizer.eos_token_id, do_sample=True, temperature=1.0, top_p=0.95
    )
    model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
    size = sum(weight.nbytes for weight in weights.values())
    expected = arithmetic.checkpoint_bytes(settings.model, precision=settings.parallel.precision, float32_head=True)
    if size != expected:
        raise StageFailed(f"export: the weights take {size} bytes, the model's settings say {expected}")
    return size


def stored(weights: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Weights in the precision they were trained in: router and LM head always float32, the rest as `precision`."""
    kept = ("mlp.gate.weight", "lm_head.weight")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        name: weight.to("cpu", torch.float32 if name.endswith(kept) else dtype).contiguous()
        for name, weight in weights.items()
    }


def rotary_note(model: Model, rotary_base: float) -> str:
    """How the rotary embedding was written, and why, in two sentences."""
    rope = convert.rope_parameters(model, rotary_base)
    if rope["rope_type"] == "default":
        return f"RoPE covers the whole head, base {rotary_base:g}, as transformers' `minimax` family has it."
    return (
        f"The model rotates {rope['partial_rotary_factor']:g} of each softmax head with RoPE base {rotary_base:g}; "
        'transformers\' `minimax` family rotates whole heads. It is therefore written with rope_type "proportional", '
        f"partial_rotary_factor {rope['partial_rotary_factor']:g} and rope_theta {rope['rope_theta']:g} (the base to "
        "the power of one over that factor), and the channels of queries and keys are reordered to match: the same "
        "function, in another notation."
    )
