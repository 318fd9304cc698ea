"""Micro-batches: right-padded or packed token sequences with labels and masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
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
        offsets: of samples packed end to end in one row: where each begins, and the row's end. None: one in each row.
        parents: of packed samples: the index of the one that each continues, or -1; the continued ones stand before
            all that continue any. None: no sample continues another.
        positions: int64, of every token in its sample, counted from the beginning of the one it continues; every row
            has the same ones. By default they follow from offsets and parents.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    padding_mask: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    offsets: tuple[int, ...] | None = None
    parents: tuple[int, ...] | None = None
    positions: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.positions is None:
            self.positions = _positions(self.tokens, self.offsets, self.parents)

    @property
    def num_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | int | str) -> Batch:
        return self._each(lambda x: x.to(device))

    def part(self, rank: int, ranks: int) -> Batch:
        """The rank-th of equal parts of every row; offsets stay those of the whole row."""
        assert ranks == 1 or self.parents is None, "samples that continue others stay on one rank"
        return self if ranks == 1 else self._each(lambda x: x.chunk(ranks, dim=1)[rank].contiguous())

    def resized(self, rows: int, length: int) -> Batch:
        """Padded to this shape. Of packed samples, the padding becomes one more, or where some continue others, the
        end of the last."""
        more = (0, length - self.tokens.shape[1], 0, rows - self.tokens.shape[0])
        if not any(more):
            return self
        assert self.offsets is None or not more[3], "packed samples stand in one row"
        offsets = self.offsets
        if offsets is not None and more[1]:
            offsets = (*(offsets if self.parents is None else offsets[:-1]), length)
        tokens = F.pad(self.tokens, more)
        return Batch(
            tokens, F.pad(self.labels, more), F.pad(self.loss_mask, more), F.pad(self.padding_mask, more, value=True),
            {name: F.pad(x, more) for name, x in self.extra.items()}, offsets, self.parents,
        )  # fmt: skip

    def in_one_row(self) -> Batch:
        """The rows end to end as packed samples; a packed batch as it is."""
        if self.offsets is not None:
            return self
        rows, length = self.tokens.shape
        flat = self._each(lambda x: x.reshape(1, -1))
        return replace(flat, offsets=tuple(range(0, rows * length + 1, length)))

    def empty(self) -> Batch:
        """Of the same shape, all of it padding."""
        padding, mask = torch.ones_like(self.padding_mask), torch.zeros_like(self.loss_mask)
        return replace(self, padding_mask=padding, loss_mask=mask)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.tokens), change(self.labels), change(self.loss_mask), change(self.padding_mask),
            {name: change(x) for name, x in self.extra.items()}, self.offsets, self.parents, change(self.positions),
        )  # fmt: skip


def _positions(tokens: Tensor, offsets: tuple[int, ...] | None, parents: tuple[int, ...] | None) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if offsets is not None:
        starts = torch.tensor(offsets[:-1], device=tokens.device)
        before = [0 if i < 0 else offsets[i + 1] - offsets[i] for i in parents or [-1] * len(starts)]
        shifts = starts - torch.tensor(before, device=tokens.device)
        positions = positions - shifts[torch.searchsorted(starts, positions, right=True) - 1]
    return positions.expand_as(tokens)


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
    batch = _blank(len(sequences), length, extra or {})
    for row, (sequence, start) in enumerate(zip(sequences, response_starts)):
        values = {name: all_values[row] for name, all_values in (extra or {}).items()}
        _place(batch, row, 0, sequence, start, values)
    return batch


def packed_batch(
    sequences: Sequence[Sequence[int]],
    response_starts: Sequence[int],
    *,
    multiple: int = 8,
    extra: dict[str, Sequence[Sequence[float]]] | None = None,
) -> Batch:
    """As `padded_batch`, but the samples stand end to end in one row, and only that row's end is padded."""
    offsets = [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence) - 1)
    used = offsets[-1]
    length = (used + multiple - 1) // multiple * multiple
    batch = _blank(1, length, extra or {})
    for i, (sequence, start) in enumerate(zip(sequences, response_starts)):
        values = {name: all_values[i] for name, all_values in (extra or {}).items()}
        _place(batch, 0, offsets[i], sequence, start, values)
    bounds = tuple(dict.fromkeys((*offsets, length)))  # a sample of one token has nothing to predict and no place
    return replace(batch, offsets=bounds, positions=None)  # type: ignore[arg-type]


def shared_prompt_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    owners: Sequence[int],
    *,
    multiple: int = 8,
    extra: dict[str, Sequence[Sequence[float]]] | None = None,
) -> Batch:
    """As `packed_batch` of all responses after their prompts, but every prompt stands in the row only once.

    The row holds the prompts but for their last tokens, then the responses, each after the last token of the prompt
    that it continues.

    Args:
        prompts: token ids, one at least in each.
        responses: token ids.
        owners: of every response, the index of its prompt.
        extra: as for `packed_batch`.
    """
    longer = [i for i, prompt in enumerate(prompts) if len(prompt) > 1]  # nothing is left of the others
    place = {i: number for number, i in enumerate(longer)}
    samples = [(prompts[i], len(prompts[i])) for i in longer]
    samples += [([prompts[i][-1], *response], 1) for i, response in zip(owners, responses)]
    parents = (*(-1 for _ in longer), *(place.get(i, -1) for i in owners))
    offsets = list(itertools.accumulate((len(sequence) - 1 for sequence, _ in samples), initial=0))
    length = (offsets[-1] + multiple - 1) // multiple * multiple
    batch = _blank(1, length, extra or {})
    for number, ((sequence, start), at) in enumerate(zip(samples, offsets), -len(longer)):
        values = {name: all_values[number] for name, all_values in (extra or {}).items()} if number >= 0 else {}
        _place(batch, 0, at, sequence, start, values)
    offsets[-1] = length  # the padding belongs to the last sample, which nothing continues
    continued = parents if max(parents) >= 0 else None
    return replace(batch, offsets=tuple(offsets), parents=continued, positions=None)  # type: ignore[arg-type]


def _blank(rows: int, length: int, names: Iterable[str]) -> Batch:
    """Nothing but padding."""
    shape = (rows, length)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    extra = {name: torch.zeros(shape) for name in names}
    return Batch(tokens, labels, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), extra)


def _place(
    batch: Batch, row: int, at: int, sequence: Sequence[int], start: int, extra: dict[str, Sequence[float]]
) -> None:
    """Write a sample into a row, its first token at `at`; its response begins at `start`."""
    ids = torch.tensor(sequence, dtype=torch.long)
    end = at + len(sequence) - 1
    batch.tokens[row, at:end], batch.labels[row, at:end] = ids[:-1], ids[1:]
    batch.loss_mask[row, at + start - 1 : end] = 1.0
    batch.padding_mask[row, at:end] = False
    for name, values in extra.items():
        batch.extra[name][row, at + start - 1 : end] = torch.tensor(values, dtype=torch.float32)
