"""Texts with a pass key: every question can be answered from the fact, and from nothing else."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m1.tokenizer import Tokenizer
from m1.training.retrieval import VALUES, Retrieval


class Words:
    """A vocabulary of 500 words, as far as `Retrieval` uses a tokenizer."""

    vocab_size = 500

    def encode(self, text: str) -> list[int]:
        return {" [pass key": [490, 491, 492], "]": [493]}[text]

    def decode(self, ids: list[int]) -> str:
        return " word" + "".join(chr(97 + int(digit)) for digit in f"{ids[0]:03d}")


def builder() -> Retrieval:
    words: Tokenizer = Words()  # type: ignore[assignment]
    return Retrieval(words)


@given(
    length=st.integers(64, 300),
    questions=st.integers(1, 8),
    seed=st.integers(0, 99),
    depth=st.one_of(st.none(), st.floats(0, 1)),
)
def test_every_question_follows_the_fact_and_has_its_answer(
    length: int, questions: int, seed: int, depth: float | None
) -> None:
    retrieval = builder()
    text = torch.arange(length + 1) + 1000  # no word of the vocabulary occurs in it
    question = retrieval.build(text, questions, numpy.random.default_rng(seed), depth=depth)
    tokens = question.tokens.tolist()
    assert len(tokens) == length + 1 and len(question.answers) == questions
    asked = [i for i in range(len(tokens)) if tokens[i : i + 3] == retrieval.ask]
    assert [i + 3 for i in asked[1:]] == question.answers, "the first occurrence is the fact, every other a question"
    values = {tokens[i + 3] for i in asked}
    assert len(values) == 1 and values <= set(retrieval.values)
    assert question.answers[-1] == length - 1, "the last question ends the text"
    plain = [token for token in tokens if token >= 1000]
    assert plain == text.tolist()[: len(plain)], "the text around is untouched"
    if depth is not None:
        assert asked[0] == int(depth * (length + 1 - 5 * (questions + 1)))


def test_the_value_varies_and_the_generator_fixes_it() -> None:
    retrieval, text = builder(), torch.arange(101) + 1000
    built = [retrieval.build(text, 1, numpy.random.default_rng(seed)) for seed in (*range(40), 0)]
    assert torch.equal(built[0].tokens, built[-1].tokens)
    assert len({int(q.tokens[q.answers[0]]) for q in built}) > 15
    assert len(retrieval.values) == VALUES


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="8 questions do not fit into 40 tokens"):
        builder().build(torch.arange(40), 8, numpy.random.default_rng(0))
