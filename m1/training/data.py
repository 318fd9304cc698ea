"""Batches of the supervised stages. The order is a pure function of seed and position: nothing to save but a step."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from m1.errors import UsageError
from m1.files import read_rows
from m1.tokenizer import Tokenizer
from m1.training.batch import Batch, packed_batch, padded_batch


class TokenStream:
    """Equally long sequences cut from a Megatron indexed data set (`<prefix>.bin`, `<prefix>.idx`).

    Documents stand end to end, each closed by its end-of-document token; sequence i covers the tokens
    [i L, (i + 1) L] for sequence length L, and every epoch visits all of them in another order.
    """

    def __init__(self, prefix: Path, sequence_length: int, seed: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        if not prefix.with_name(prefix.name + ".idx").is_file():
            raise UsageError(f"no token data set at {prefix}", "Make it with the tokens stage.")
        dataset = IndexedDataset(str(prefix))
        # Documents are contiguous in the .bin file, so the whole set is one array.
        self.tokens = numpy.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r")
        self.sequence_length, self.seed = sequence_length, seed
        self.num_sequences = (len(self.tokens) - 1) // sequence_length
        if self.num_sequences < 1:
            raise UsageError(
                f"{prefix} holds {len(self.tokens)} tokens, fewer than one sequence of {sequence_length}",
                "Use more text or a shorter sequence_length.",
            )

    def sequence(self, index: int) -> Tensor:
        """Sequence number `index` of the endless shuffled order, int64 (sequence_length + 1,)."""
        return self.in_order(shuffled(self.num_sequences, self.seed, index))

    def in_order(self, index: int) -> Tensor:
        """Sequence number `index` in the order of the file."""
        start = index * self.sequence_length
        return torch.from_numpy(self.tokens[start : start + self.sequence_length + 1].astype(numpy.int64))

    def sequences(self, indices: range) -> Tensor:
        """Consecutive sequences of the shuffled order, (len(indices), sequence_length + 1)."""
        return torch.stack([self.sequence(index) for index in indices])


@dataclass(frozen=True)
class Sample:
    """One worked answer as token ids; the response begins at `response_start`."""

    ids: list[int]
    response_start: int


def read_samples(file: Path, tokenizer: Tokenizer, longest: int) -> list[Sample]:
    """Prompt + response pairs of a JSON-lines file, those of at most `longest` tokens.

    Raises:
        UsageError: the file is missing or damaged, or no sample fits.
    """
    if not file.is_file():
        raise UsageError(f"no samples at {file}", "Make them with the sft-data stage.")
    rows = read_rows(file, "Make it again with the sft-data stage.")
    for number, row in enumerate(rows, 1):
        if not (isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str)):
            raise UsageError(f"{file}:{number} has no prompt or no response", "Make it again with the sft-data stage.")
    prompts = tokenizer.encode_chats([row["prompt"] for row in rows])
    responses = tokenizer.encode_chats([row["response"] for row in rows])
    samples = [Sample(p + r, len(p)) for p, r in zip(prompts, responses) if len(p) + len(r) <= longest]
    if not samples:
        raise UsageError(f"every sample of {file} is longer than {longest} tokens", "Raise sft.sequence_length.")
    return samples


def shuffled(count: int, seed: int, index: int) -> int:
    """Element number `index` of an endless order over `count` elements, reshuffled every epoch."""
    epoch, within = divmod(index, count)
    return int(_order(count, seed, epoch)[within])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> numpy.ndarray:
    """Kept between calls: a batch asks for many places of one order, at an epoch's end of two."""
    return numpy.random.default_rng([seed, epoch]).permutation(count)


def share(items: list, rank: int, ranks: int) -> list:
    """Every `ranks`-th item, beginning at `rank`."""
    return items[rank::ranks]


def deal(items: list, rank: int, ranks: int) -> list:
    """As `share`, but back and forth over the ranks: of items in order of length none gets the longer of every pair."""
    rounds = (items[start : start + ranks] for start in range(0, len(items), ranks))
    places = (rank if number % 2 == 0 else ranks - 1 - rank for number in itertools.count())
    return [items[place] for items, place in zip(rounds, places) if place < len(items)]


def sample_batches(
    samples: list[Sample], micro_batch_size: int, rank: int, ranks: int, *, packed: bool = False
) -> list[Batch]:
    """Micro-batches of this rank out of one global batch.

    Args:
        packed: the samples of a micro-batch stand end to end in one row, short ones and long ones on every rank.
            Otherwise they are sorted by length, so that little of a micro-batch is padding.
    """
    by_length = sorted(samples, key=lambda sample: len(sample.ids))
    if packed:
        groups = _cut(deal(by_length, rank, ranks), micro_batch_size)
    else:
        groups = deal(_cut(by_length, micro_batch_size), rank, ranks)
    make = packed_batch if packed else padded_batch
    return [make([s.ids for s in group], [s.response_start for s in group]) for group in groups]


def _cut(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def even_batches(
    samples: list[Sample], micro_batch_size: int, rank: int, ranks: int, *, packed: bool = False
) -> list[Batch]:
    """As `sample_batches` for any number of samples: as many full micro-batches on every rank as there are samples for.

    A few samples make smaller micro-batches, and fewer samples than ranks are measured on every rank.
    """
    if len(samples) < ranks:
        samples = samples * ranks
    size = min(micro_batch_size, len(samples) // ranks)
    whole = len(samples) // (size * ranks) * size * ranks
    return sample_batches(samples[:whole], size, rank, ranks, packed=packed)
