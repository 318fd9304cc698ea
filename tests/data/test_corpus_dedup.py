"""Planted duplicates are found, different texts are kept, and removal leaves a kept original for each."""

from __future__ import annotations

import random

from data_inputs import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.data.corpus_spec import NearDuplicates
from stages.corpus.dedup import find_duplicates

RULES = NearDuplicates()


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """Word n-grams, for the exact Jaccard similarity."""
    words = [word.strip(".") for word in text.lower().split()]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(first: str, second: str) -> float:
    return len(shingles(first) & shingles(second)) / len(shingles(first) | shingles(second))


def edit(text: str, words: int, seed: int) -> str:
    """Replace some words of the text."""
    draw = random.Random(seed)
    parts = text.split(" ")
    for index in draw.sample(range(len(parts)), words):
        parts[index] = f"changed{index}"
    return " ".join(parts)


def test_finds_planted_duplicates_and_nothing_else() -> None:
    texts = [sentences(seed, 60) for seed in range(20)]
    # Numbers are normalised before comparison, so random sentences of one pattern are the hard case for the others.
    near = [edit(texts[i], 8, seed=i) for i in range(5)]
    assert all(jaccard(texts[i], near[i]) > 0.85 for i in range(5))
    exact = [texts[7], texts[8]]
    found = find_duplicates([*texts, *near, *exact], RULES)
    assert found == {20 + i: ("near_duplicate", i) for i in range(5)} | {
        25: ("exact_duplicate", 7),
        26: ("exact_duplicate", 8),
    }


def test_formatting_alone_makes_no_new_text() -> None:
    text = sentences(1, 60)
    assert find_duplicates([text, text.upper().replace("\n", "  ").replace(".", "!")], RULES) == {
        1: ("near_duplicate", 0)
    }


def test_texts_shorter_than_a_shingle() -> None:
    assert find_duplicates(["a b", "c d", "a b", ""], RULES) == {2: ("exact_duplicate", 0)}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(0, 100))
def test_every_removed_text_has_a_kept_original(seeds: list[int], edits: int) -> None:
    texts = [edit(sentences(seed, 30), edits % 4, seed=edits) for seed in seeds]
    found = find_duplicates(texts, RULES)
    for index, (_, original) in found.items():
        assert original < index and original not in found
        assert jaccard(texts[index], texts[original]) > 0.5
    kept = [text for index, text in enumerate(texts) if index not in found]
    assert len(set(kept)) == len(kept) == len(set(seeds))
