"""Batches and the order of data."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m1.model  # noqa: F401  (prepares Megatron-core for this machine)
from m1.errors import UsageError
from m1.training.batch import full_batch, packed_batch, padded_batch, shared_prompt_batch
from m1.training.data import Sample, TokenStream, even_batches, sample_batches, shuffled

ids = st.lists(st.integers(1, 99), min_size=1, max_size=20)
sequences = st.lists(
    st.tuples(ids, ids),
    min_size=1,
    max_size=6,
)  # fmt: skip


@settings(deadline=None)
@given(sequences)
def test_the_labels_that_count_are_exactly_the_responses(pairs: list[tuple[list[int], list[int]]]) -> None:
    values = [[float(i) for i in range(len(response))] for _, response in pairs]
    batch = padded_batch([p + r for p, r in pairs], [len(p) for p, _ in pairs], extra={"value": values})
    assert batch.tokens.shape[1] % 8 == 0
    for row, (prompt, response) in enumerate(pairs):
        counts = batch.loss_mask[row].bool()
        assert batch.labels[row][counts].tolist() == response
        assert batch.extra["value"][row][counts].tolist() == values[row]
        assert batch.tokens[row][~batch.padding_mask[row]].tolist() == (prompt + response)[:-1]


@settings(deadline=None)
@given(sequences)
def test_a_packed_row_holds_what_the_padded_rows_hold(pairs: list[tuple[list[int], list[int]]]) -> None:
    samples, starts = [p + r for p, r in pairs], [len(p) for p, _ in pairs]
    values = {"value": [[float(i) for i in range(len(response))] for _, response in pairs]}
    padded, packed = padded_batch(samples, starts, extra=values), packed_batch(samples, starts, extra=values)
    for name in ("tokens", "labels", "loss_mask", "positions"):
        real = [getattr(padded, name)[~padded.padding_mask], getattr(packed, name)[~packed.padding_mask]]
        assert torch.equal(*real), name
    assert torch.equal(padded.extra["value"][~padded.padding_mask], packed.extra["value"][~packed.padding_mask])
    assert packed.tokens.shape[0] == 1 and packed.tokens.shape[1] % 8 == 0
    assert packed.offsets is not None and packed.offsets[-1] == packed.tokens.shape[1]
    starts_of_samples = (packed.positions[0] == 0).nonzero().flatten().tolist()
    assert starts_of_samples == list(packed.offsets[:-1])


@settings(deadline=None)
@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_a_shared_prompt_stands_once_before_all_its_responses(groups: list[tuple[list[int], list[list[int]]]]) -> None:
    prompts = [prompt for prompt, _ in groups]
    pairs = [(owner, response) for owner, (_, some) in enumerate(groups) for response in some]
    owners, responses = [owner for owner, _ in pairs], [response for _, response in pairs]
    values = {"value": [[float(i) for i in range(len(response))] for response in responses]}
    batch = shared_prompt_batch(prompts, responses, owners, extra=values)
    assert batch.offsets is not None and batch.tokens.shape == (1, batch.offsets[-1]) and batch.offsets[-1] % 8 == 0
    assert int((~batch.padding_mask).sum()) == sum(len(p) - 1 for p in prompts) + sum(map(len, responses))
    counts = batch.loss_mask > 0
    assert batch.labels[counts].tolist() == [token for response in responses for token in response]
    assert batch.extra["value"][counts].tolist() == [value for some in values["value"] for value in some]

    ranges = [range(*bounds) for bounds in itertools.pairwise(batch.offsets)]
    parents = batch.parents or (-1,) * len(ranges)
    for sample, (owner, response) in enumerate(pairs, len(ranges) - len(pairs)):
        seen = [*(ranges[parents[sample]] if parents[sample] >= 0 else ()), *ranges[sample]]
        seen = [place for place in seen if not batch.padding_mask[0, place]]
        assert batch.tokens[0, seen].tolist() == (prompts[owner] + response)[:-1]
        assert batch.positions[0, seen].tolist() == list(range(len(seen)))
        assert parents[sample] < sample


@settings(deadline=None)
@given(rows=st.integers(1, 3), length=st.sampled_from([8, 12, 20]), ranks=st.sampled_from([1, 2, 4]))
def test_parts_of_a_batch_are_its_tokens_in_order(rows: int, length: int, ranks: int) -> None:
    batch = full_batch(torch.arange(rows * (length + 1)).view(rows, -1))
    parts = [batch.part(rank, ranks) for rank in range(ranks)]
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))


def test_a_resized_batch_adds_nothing_that_counts() -> None:
    batch = padded_batch([[1, 2, 3, 4], [5, 6]], [1, 1], extra={"value": [[1.0, 2.0, 3.0], [4.0]]})
    larger = batch.resized(3, 20)
    assert larger.tokens.shape == larger.extra["value"].shape == (3, 20)
    assert larger.num_tokens == batch.num_tokens == 4
    assert torch.equal(larger.tokens[~larger.padding_mask], batch.tokens[~batch.padding_mask])
    packed = packed_batch([[1, 2, 3, 4], [5, 6]], [1, 1]).resized(1, 20)
    assert packed.offsets == (0, 3, 4, 8, 20) and packed.positions[0, 8:].tolist() == list(range(12))
    shared = shared_prompt_batch([[1, 2, 3]], [[4], [5, 6]], [0, 0])
    longer = shared.resized(1, 20)
    assert (shared.offsets, longer.offsets, longer.parents) == ((0, 2, 3, 8), (0, 2, 3, 20), shared.parents)
    assert longer.tokens[0, :8].tolist() == shared.tokens[0].tolist() and longer.num_tokens == 3
    assert batch.empty().num_tokens == 0 and batch.empty().padding_mask.all()


def test_rows_end_to_end_are_packed_samples() -> None:
    flat = full_batch(torch.arange(14).view(2, 7)).in_one_row()
    assert flat.offsets == (0, 6, 12) and flat.tokens[0].tolist() == [*range(6), *range(7, 13)]
    assert flat.positions[0].tolist() == [*range(6), *range(6)]


def test_labels_of_a_full_batch_are_the_next_tokens() -> None:
    batch = full_batch(torch.arange(12).view(2, 6))
    assert torch.equal(batch.labels, batch.tokens + 1) and batch.num_tokens == 10


@settings(deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_every_epoch_visits_every_element_once(count: int, seed: int, epochs: int) -> None:
    order = [shuffled(count, seed, index) for index in range(count * epochs)]
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(size=st.sampled_from([4, 8, 12]), ranks=st.sampled_from([1, 2]))
def test_ranks_share_a_global_batch_without_loss_or_repetition(size: int, ranks: int) -> None:
    samples = [Sample(list(range(1, 3 + i)), 1) for i in range(size)]
    batches = [sample_batches(samples, 2, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in batches}) == 1
    lengths = [int((~b.padding_mask).sum(1)[row]) for part in batches for b in part for row in range(2)]
    assert sorted(lengths) == sorted(len(sample.ids) - 1 for sample in samples)


@settings(deadline=None)
@given(size=st.sampled_from([4, 8, 12]), ranks=st.sampled_from([1, 2]))
def test_packed_samples_are_shared_out_evenly(size: int, ranks: int) -> None:
    samples = [Sample(list(range(1, 3 + i)), 1) for i in range(size)]
    batches = [sample_batches(samples, 2, rank, ranks, packed=True) for rank in range(ranks)]
    assert len({len(part) for part in batches}) == 1
    tokens = [sum(int((~batch.padding_mask).sum()) for batch in part) for part in batches]
    assert sum(tokens) == sum(len(sample.ids) - 1 for sample in samples)
    assert max(tokens) - min(tokens) <= size // 2


@settings(deadline=None)
@given(size=st.integers(1, 20), micro=st.integers(1, 8), ranks=st.sampled_from([1, 2, 3]))
def test_any_number_of_held_out_samples_gives_every_rank_the_same_number_of_batches(
    size: int, micro: int, ranks: int
) -> None:
    samples = [Sample([1, 2, 3], 1)] * size
    batches = [even_batches(samples, micro, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in batches}) == 1 and batches[0]


@pytest.fixture
def prefix(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=numpy.uint16)
    for start in range(0, 1000, 100):
        builder.add_document(torch.arange(start, start + 100), [100])
    builder.finalize(str(tmp_path / "train.idx"))
    return tmp_path / "train"


def test_a_stream_covers_the_documents_end_to_end(prefix) -> None:
    stream = TokenStream(prefix, 64, seed=1)
    assert stream.num_sequences == 15
    assert stream.in_order(3).tolist() == list(range(192, 257))
    first_epoch = sorted(int(stream.sequence(i)[0]) for i in range(15))
    assert first_epoch == [64 * i for i in range(15)]
    again = TokenStream(prefix, 64, seed=1)
    assert all(torch.equal(stream.sequence(i), again.sequence(i)) for i in range(40))
    assert [int(stream.sequence(i)[0]) for i in range(15)] != [int(stream.sequence(i)[0]) for i in range(15, 30)]


def test_too_little_text_is_refused(prefix) -> None:
    with pytest.raises(UsageError, match="fewer than one sequence of 2000"):
        TokenStream(prefix, 2000, seed=1)
    with pytest.raises(UsageError, match="no token data set"):
        TokenStream(prefix.with_name("absent"), 10, seed=1)
