"""Micro-batches: right-padded token sequences with labels and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch; every tensor is (micro batch, sequence).

    Attributes:
        tokens: int64 input ids, right-padded.
        labels: int64, the next token at each position.
        loss_mask: float32, 1 where the label counts.
        padding_mask: bool, True where the input is padding: such tokens stay out of the routers' auxiliary loss.
        extra: further tensors of the same shape for a loss function (advantages, old log-probabilities).
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    padding_mask: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.loss_mask.sum())


def full_batch(sequences: Tensor) -> Batch:
    """Batch of equally long sequences (batch, sequence + 1) where every label counts."""
    tokens, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
    nothing_padded = torch.zeros_like(tokens, dtype=torch.bool)
    return Batch(tokens, labels, torch.ones_like(tokens, dtype=torch.float32), nothing_padded)


def padded_batch(
    sequences: Sequence[Sequence[int]],
    response_starts: Sequence[int],
    *,
    multiple: int = 8,
    extra: dict[str, Sequence[Sequence[float]]] | None = None,
) -> Batch:
    """Batch of prompt + response sequences; only response tokens are labels that count.

    Args:
        sequences: token ids of prompt and response together.
        response_starts: index of the first response token in each.
        multiple: the common length is rounded up to this, so that few different shapes occur.
        extra: name -> per sequence one float per response token; placed where that token is the label.
    """
    longest = max(len(s) for s in sequences) - 1
    length = (longest + multiple - 1) // multiple * multiple
    shape = (len(sequences), length)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask, padding = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    extras = {name: torch.zeros(shape) for name in extra or {}}
    for row, (sequence, start) in enumerate(zip(sequences, response_starts)):
        ids = torch.tensor(sequence, dtype=torch.long)
        used = len(sequence) - 1
        tokens[row, :used], labels[row, :used] = ids[:-1], ids[1:]
        mask[row, start - 1 : used] = 1.0
        padding[row, :used] = False
        for name, values in (extra or {}).items():
            extras[name][row, start - 1 : used] = torch.tensor(values[row], dtype=torch.float32)
    return Batch(tokens, labels, mask, padding, extras)
