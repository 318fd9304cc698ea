"""How samples are dealt out to the ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.training.data import Sample, deal, sample_batches


@given(st.lists(st.integers()), st.integers(1, 8))
def test_every_item_is_dealt_once_and_evenly(items: list[int], ranks: int) -> None:
    hands = [deal(items, rank, ranks) for rank in range(ranks)]
    assert sorted(item for hand in hands for item in hand) == sorted(items)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_gets_the_longer_of_every_pair(ranks: int) -> None:
    assert {sum(deal(list(range(32)), rank, ranks)) for rank in range(ranks)} == {sum(range(32)) // ranks}


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_of_all_ranks_are_the_global_batch(packed: bool) -> None:
    samples = [Sample([length] * length, 1) for length in range(2, 26)]
    batches = [batch for rank in (0, 1) for batch in sample_batches(samples, 4, rank, 2, packed=packed)]
    assert len(batches) == 6
    assert sum(batch.num_tokens for batch in batches) == sum(len(sample.ids) - 1 for sample in samples)
    if not packed:
        assert all(len(batch.tokens) == 4 for batch in batches)
