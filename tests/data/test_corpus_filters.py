"""Filters reject what they are named for and keep natural text; thresholds of the spec are obeyed."""

from __future__ import annotations

import random

import pytest
from data_inputs import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import paths
from m1.data import corpus_spec as spec
from m1.data.corpus_spec import CodeRules, Filters, QualityRules, RepetitionRules
from stages.corpus import filters

PROSE = filters.build(Filters(quality=QualityRules(), repetition=RepetitionRules()))
CODE = filters.build(Filters(code=CodeRules()))


def test_keeps_natural_text() -> None:
    text = """\
The recipe begins with a base model that has read a great deal of text. It is then taught to reason with worked
answers, and to hold a longer context in four steps. Each step is short, because a long one makes the gradients explode.
What follows is reinforcement learning: answers are drawn in groups, compared with each other, and the better ones are
made more likely. Nothing in this paragraph repeats itself, so that no filter should have a reason to throw it away.
"""
    assert filters.rejection(text, PROSE) is None


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"),
        (" \n\n ", "empty"),
        ("Too few words to learn from.", "gopher_short_doc"),
        ("The cat and the dog went to the park. " * 40, "top_3_gram"),
        ("\n".join(f"- the item with the number {i} that have to go" for i in range(30)), "gopher_too_many_bullets"),
        (sentences(1, 9) * 2, "dup_line_frac"),
        (" ".join(f"{i} {i * 37} = {i * 91}" for i in range(100)) + " the and", "gopher_below_"),
        ("word " * 10 + " ".join(f"abcdefghijklmnopq{i}" for i in range(60)) + " the of", "gopher_above_avg_threshold"),
    ],
)
def test_rejects_with_the_reason(text: str, reason: str) -> None:
    found = filters.rejection(text, PROSE)
    assert found is not None and found.startswith(reason)


def test_code_rules() -> None:
    code = "def area(radius):\n    pi = 3.14159\n    return pi * radius ** 2\n\n\nprint(area(2))\n"
    assert filters.rejection(code, CODE) is None
    assert filters.rejection("x = 1\n", CODE) == "code_too_few_lines"
    assert filters.rejection(code + "x = '" + "a" * 2000 + "'\n", CODE) == "code_long_line"
    assert filters.rejection("value = " + "abcde + " * 20 + "1\n" + ("b" * 150 + "\n") * 9, CODE) == "code_long_lines"
    assert filters.rejection("(((((((())))))))\n" * 10, CODE) == "code_few_letters"
    table = "\n".join(f"row{i} = [{i * 7919}, {i * 104729}]" for i in range(1, 30))
    assert filters.rejection(table, CODE) in ("code_many_digits", "code_few_letters")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(10, 60))
def test_a_stricter_length_never_keeps_more(seed: int, count: int) -> None:
    text = sentences(seed, count)
    words = len(filters.WORDS.word_tokenize(text.replace(".", "")))
    rules = [Filters(quality=QualityRules(min_doc_words=limit)) for limit in (words, words + 1)]
    kept, rejected = (filters.rejection(text, filters.build(rule)) for rule in rules)
    assert kept is None
    assert rejected == "gopher_short_doc"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_repeating_lines_is_found_at_the_threshold(seed: int) -> None:
    lines = sentences(seed, 40).splitlines()
    rules = RepetitionRules(dup_line_frac=0.25, dup_line_char_frac=None, dup_para_frac=None, dup_para_char_frac=None,
                            top_n_grams={}, dup_n_grams={})  # fmt: skip
    checks = filters.build(Filters(repetition=rules))
    draw = random.Random(seed)
    unique = list(dict.fromkeys(lines))
    few = unique + draw.choices(unique, k=len(unique) // 5)  # 1/6 of the lines are repeats
    many = unique + draw.choices(unique, k=len(unique))  # 1/2
    assert filters.rejection("\n".join(few), checks) is None
    assert filters.rejection("\n".join(many), checks) == "dup_line_frac"


def test_shipped_filters_have_high_recall_on_mathematics_and_code() -> None:
    """MiniMax-M1 report §2.1 tunes the cleaning for high recall on mathematics and code."""
    rules = spec.load("corpus-tiny", paths.DATA_SPECS).filters
    mathematics = "\n".join(
        f">>> integrate(x**{n}, (x, 0, {n}))  # the area under x^{n} from 0 to {n}\n{n**n}/{n + 1}\n"
        f"For n = {n} the value is $\\frac{{{n}^{{{n + 1}}}}}{{{n + 1}}}$, as the power rule says."
        for n in range(2, 12)
    )
    assert filters.rejection(mathematics, filters.build(rules["stem"])) is None
    with open(filters.__file__, encoding="utf-8") as file:
        assert filters.rejection(file.read(), filters.build(rules["code"])) is None
