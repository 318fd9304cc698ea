"""How large a hybrid is and what it costs to run, in closed form from the profile; no torch, no weights.

Conventions: one multiply-add is two operations. Norms, activations, softmax and rotary embedding are left out, as they
are in the published counts: for the sizes of MiniMax-M1 they are below a thousandth of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from m1.config.model import Model

#: Block length of the training and prefill form of lightning attention (MiniMax-01, arXiv 2501.08313 §2.2).
LIGHTNING_BLOCK = 256


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        embedding, head: token embedding and LM head, vocabulary x hidden each.
        lightning, softmax: attention projections over all layers of each kind.
        router, experts: over all layers.
        active_experts: the part of `experts` that one token uses.
        norms: every RMSNorm weight.
    """

    embedding: int
    head: int
    lightning: int
    softmax: int
    router: int
    experts: int
    active_experts: int
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.lightning + self.softmax + self.router + self.experts + self.norms

    @property
    def active(self) -> int:
        """What one token uses, without embedding, head and norms: the convention of the published 45.9 billion."""
        return self.lightning + self.softmax + self.router + self.active_experts


@dataclass(frozen=True)
class DecodeFlops:
    """Operations for one more token.

    Attributes:
        linear: two for each active parameter.
        head: two for each parameter of the LM head, which the published counts leave out.
        softmax: scores and weighted values over the context; grows with it.
        lightning: update and read of the recurrent state; constant.
    """

    linear: int
    head: int
    softmax: int
    lightning: int

    @property
    def total(self) -> int:
        return self.linear + self.head + self.softmax + self.lightning


def softmax_layers(model: Model) -> int:
    """Layers with softmax attention."""
    return sum(model.is_softmax_layer(layer) for layer in range(model.num_layers))


def parameters(model: Model) -> Counts:
    """Parameter counts of the hybrid (MiniMax-01 §2: 456 billion, 45.9 of them active, for its 80 layers).

    With hidden size D, heads of total width W, key/value width K, F channels in each of E experts, k of them used:
    lightning 5DW (q, k, v, gate, output), softmax 2DW + 2DK, router ED, expert 3DF, norms 2D a layer plus W in a
    lightning layer plus D before the head.
    """
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
    softmax = softmax_layers(model)
    lightning = model.num_layers - softmax
    expert = 3 * hidden * model.moe_ffn_hidden_size
    return Counts(
        embedding=model.vocab_size * hidden,
        head=model.vocab_size * hidden,
        lightning=lightning * 5 * hidden * width,
        softmax=softmax * 2 * hidden * (width + model.num_query_groups * model.head_dim),
        router=model.num_layers * model.num_experts * hidden,
        experts=model.num_layers * model.num_experts * expert,
        active_experts=model.num_layers * model.moe_router_topk * expert,
        norms=model.num_layers * 2 * hidden + lightning * width + hidden,
    )


def checkpoint_bytes(model: Model, *, precision: Literal["fp32", "bf16"] = "bf16", float32_head: bool = False) -> int:
    """Bytes of the tensors of a transformers checkpoint.

    Args:
        precision: of the weights; router weights are always float32.
        float32_head: whether the LM head is stored in float32 too, as this project trains and exports it. The released
            MiniMax-M1 checkpoint stores it in bfloat16 and comes to 912,210,767,872 bytes.
    """
    counts = parameters(model)
    in_float32 = counts.total if precision == "fp32" else counts.router + (counts.head if float32_head else 0)
    return 4 * in_float32 + 2 * (counts.total - in_float32)


def decode_flops(model: Model, context_length: int) -> DecodeFlops:
    """Operations to generate one token when `context_length` tokens, itself included, are attended to.

    Softmax attention takes 4d for each head and attended token (scores and values). Lightning attention takes 5d^2 for
    each head: decay 1, update k v^T 2, read q S 2, in units of d^2 (recurrence of MiniMax-01 §2.2).
    """
    counts = parameters(model)
    softmax = softmax_layers(model)
    heads, dim = model.num_attention_heads, model.head_dim
    return DecodeFlops(
        linear=2 * counts.active,
        head=2 * counts.head,
        softmax=softmax * heads * 4 * dim * context_length,
        lightning=(model.num_layers - softmax) * heads * 5 * dim * dim,
    )


def forward_flops(model: Model, tokens: float, sequence_length: int) -> float:
    """Operations of the forward pass over `tokens` tokens in causal sequences of `sequence_length`.

    Two for each active parameter and each parameter of the head; softmax attention 4d for each head and attended token,
    of which there are (s + 1) / 2 on average; lightning attention in blocks of B = min(256, s): 2Bd inside the causal
    block and 4d^2 between blocks, for each head and token (8d^2 for the paper's d = 128).
    """
    counts = parameters(model)
    softmax = softmax_layers(model)
    heads, dim = model.num_attention_heads, model.head_dim
    block = min(LIGHTNING_BLOCK, sequence_length)
    per_token = (
        2 * (counts.active + counts.head)
        + softmax * heads * 4 * dim * (sequence_length + 1) / 2
        + (model.num_layers - softmax) * heads * (2 * block * dim + 4 * dim * dim)
    )
    return tokens * per_token


def training_flops(model: Model, tokens: float, sequence_length: int) -> float:
    """Operations to train on `tokens` tokens without recomputation: the backward pass costs twice the forward pass."""
    return 3 * forward_flops(model, tokens, sequence_length)
