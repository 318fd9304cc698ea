"""The exported model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from m1.config.base import Section


class Export(Section):
    """Safetensors that others read, checked before they count as done."""

    layout: Literal["transformers", "minimax-m1"] = Field(
        "transformers", description="for transformers' MiniMaxForCausalLM, or as MiniMax-M1 was released (vLLM)"
    )
    head_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the LM head, which is trained in float32; bf16 rounds it, as the released checkpoint does",
    )
    shard_gigabytes: float = Field(5.0, gt=0, description="largest file of weights, in 10^9 bytes")
    check: Literal["logits", "weights"] = Field(
        "logits",
        description="weights: every tensor read back, bit for bit, one at a time; logits: also log-probabilities "
        "beside the training model, which takes both models in the memory of one process",
    )
    check_tokens: int = Field(ge=1, description="length of the sequence on which both models are compared")
    tolerance: float = Field(gt=0, description="largest allowed absolute difference of the log-probabilities")
