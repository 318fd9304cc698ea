"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

#: A nucleus is looked for among this many most probable tokens before the whole vocabulary is sorted.
_NUCLEUS_GUESS = 64


@torch.inference_mode()
def sample(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the given uniform numbers.

    The nucleus of top_p is the smallest set of most probable tokens whose probabilities (at this temperature) sum to
    at least top_p; its probabilities are renormalised.

    Args:
        logits: float32 (batch, vocabulary).
        uniforms: float32 (batch,) in [0, 1).

    Returns:
        int64 tokens (batch,) and their float32 log-probabilities under softmax(logits); NaN where logits are none.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    scaled = logprobs if temperature == 1.0 else torch.log_softmax(logits / temperature, dim=-1)
    if top_p < 1.0:
        values, order = nucleus(scaled.exp(), top_p)
        tokens = order.gather(1, _invert(values, uniforms)[:, None])[:, 0]
    else:
        tokens = _invert(scaled.exp(), uniforms)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The nucleus in falling order of probability: values (batch, n), zero outside it, and token ids (batch, n)."""
    guess = min(_NUCLEUS_GUESS, probabilities.shape[1])
    values, order = probabilities.topk(guess, dim=-1)
    if guess < probabilities.shape[1] and bool((values.sum(-1) < top_p).any()):
        values, order = probabilities.sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    return values.masked_fill(before >= top_p, 0.0), order


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the first cumulative sum above uniform x total; never an entry of probability zero."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    # Rounding may put the target at the total itself: step back to the last entry that has any mass.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1:], torch.zeros_like(target)))
    # Where probabilities are NaN nothing is found; the token is then none, and its log-probability says so.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)
