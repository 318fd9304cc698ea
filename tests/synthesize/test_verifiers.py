"""Verifiers: every correct form is accepted, everything else refused, nothing raises, nothing is evaluated."""

from __future__ import annotations

import ast
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import chat
from m1.tasks import logic
from m1.tasks.base import Verdict
from m1.tasks.logic import LEVELS, TASKS, Problem
from m1.tasks.logic.judging import RuleJudge, score

INTEGER_TASKS = ("arithmetic", "object_counting", "operation")
SET_TASKS = ("boolean_expressions", "web_of_lies")
#: Text a model may produce: symbols of all answers, digits, signs, brackets, tags, and any character at all.
MODEL_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from([*"0123456789+-*/().,;: \n\t[]{}<>ABCDEabcde", "none", "unknown", "T", "F", "<answer>", "\u0663"]),
    max_size=20,
).map("".join)  # fmt: skip


def problem(name: str, level: int = 2, seed: int = 0) -> Problem:
    return TASKS[name].generate(random.Random(seed), level)


def accepts(p: Problem, text: str) -> bool:
    return TASKS[p.task].verify(p.state, text)


@pytest.mark.parametrize("name", sorted(TASKS))
@settings(max_examples=150, deadline=None)
@given(text=MODEL_TEXT, seed=st.integers(0, 50), level=st.sampled_from(LEVELS))
def test_no_text_raises_and_only_the_answer_passes(name: str, text: str, seed: int, level: int) -> None:
    p = problem(name, level, seed)
    verdict = accepts(p, text)
    assert isinstance(verdict, bool)
    # Whatever passes has the symbols of the answer and no others, but for separators, a sign and leading zeros.
    if verdict:
        kept = sorted(c for c in text if c not in " \t\n\r\f\v,;:")
        if name in INTEGER_TASKS:
            assert int(text.replace(" ", "")) == int(p.answer)
        else:
            assert kept == sorted(c for c in p.answer if c not in " ,")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_white_space_around_and_doubled_inside_does_not_matter(name: str) -> None:
    for seed in range(20):
        p = problem(name, seed=seed)
        for text in (f" {p.answer}\n", p.answer.replace(" ", "  "), f"\t{p.answer} ", p.answer.replace(" ", "\n")):
            assert accepts(p, text), (p, text)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_empty_truncated_doubled_and_decorated_answers_are_refused(name: str) -> None:
    for seed, level in itertools.product(range(20), (1, 3, 7)):
        p = problem(name, level, seed)
        wrong = [
            "",
            " ",
            ",",
            p.answer * 2,
            f"{p.answer} {p.answer}",
            f"answer {p.answer}",
            f"{p.answer}?",
            f"'{p.answer}'",
        ]
        wrong += [p.answer + " none", "unknown", "None", p.question, p.reasoning + " .", f"={p.answer}", "x" * 10_000]
        if len(p.answer) > 1 and name not in SET_TASKS:
            wrong += [p.answer[:-1].rstrip(", "), p.answer[1:].lstrip(", ")]
        for text in wrong:
            if name in INTEGER_TASKS and text.strip("+-").isdigit() and int(text) == int(p.answer):
                continue  # cutting "+5" or "05" keeps the value
            assert not accepts(p, text), (p, text)


@pytest.mark.parametrize("name", INTEGER_TASKS)
@settings(max_examples=100, deadline=None)
@given(guess=st.integers(-(10**30), 10**30) | st.integers(-30, 30), seed=st.integers(0, 200))
def test_an_integer_passes_only_if_it_is_the_value(name: str, guess: int, seed: int) -> None:
    p = problem(name, seed=seed)
    assert accepts(p, str(guess)) == (guess == int(p.answer))


@pytest.mark.parametrize("name", INTEGER_TASKS)
def test_integer_forms(name: str) -> None:
    p = problem(name)
    value = int(p.answer)
    sign = "-" if value < 0 else ""
    for text in (f"{sign}00{abs(value)}", f" {sign}{abs(value)} ", f"{sign} {abs(value)}"):
        assert accepts(p, text)
    assert accepts(p, f"+{value}") == (value >= 0)
    arabic_indic = "".join(chr(0x660 + int(digit)) for digit in str(abs(value)))
    wrong = [
        f"{value}.0",
        f"{value}+0",
        f"{value - 1}+1",
        f"({value})",
        f"{value}e0",
        f"0x{abs(value):x}",
        f"--{value}",
    ]
    for text in (*wrong, f"{value}_", arabic_indic, "9" * 5000, f"{value} {value}"):
        assert not accepts(p, text), text


def test_negative_integers_and_zero() -> None:
    state = {"solution": "-17"}
    for text in ("-17", " - 17", "-017"):
        assert TASKS["arithmetic"].verify(state, text)
    for text in ("17", "+17", "--17", "-1 7"):
        assert not TASKS["arithmetic"].verify(state, text)
    assert TASKS["arithmetic"].verify({"solution": "0"}, "-0") and TASKS["arithmetic"].verify({"solution": "0"}, "000")


@pytest.mark.parametrize("name", SET_TASKS)
def test_exactly_one_subset_passes_in_any_order(name: str) -> None:
    for seed in range(30):
        p = problem(name, seed=seed)
        if name == "boolean_expressions":
            everybody = "ABC"
        else:
            everybody = [p.state["known"][0], *(speaker for speaker, *_ in p.state["statements"])]
        right = set() if p.answer == "none" else set(p.answer.split())
        for size in range(len(everybody) + 1):
            for subset in itertools.combinations(everybody, size):
                texts = [", ".join(subset), " ".join(reversed(subset))] if subset else ["none"]
                for text in texts:
                    assert accepts(p, text) == (set(subset) == right), (p, text)


def test_unknown_is_not_read_as_no() -> None:
    nobody = next(p for seed in range(1000) if (p := problem("web_of_lies", 1, seed)).answer == "none")
    assert accepts(nobody, "none")
    for text in ("unknown", "no", "nobody", "none none", "none of them", "not none", "nonene", "N"):
        assert not accepts(nobody, text)
    somebody = next(p for seed in range(100) if (p := problem("web_of_lies", 1, seed)).answer != "none")
    for text in ("none", "unknown", f"{somebody.answer} unknown", f"none {somebody.answer}", somebody.answer.lower()):
        assert not accepts(somebody, text)


def test_dyck_takes_only_the_one_completion() -> None:
    for seed in range(20):
        p = problem("dyck_language", 1, seed)
        right = p.answer.split()
        assert accepts(p, "".join(right))
        for guess in itertools.product(")]}>", repeat=len(right)):
            assert accepts(p, " ".join(guess)) == (list(guess) == right)
        for text in (p.answer + " )", "( " + p.answer, p.answer + " ( )", ""):
            assert not accepts(p, text)


def test_goods_takes_only_the_one_assignment() -> None:
    for seed in range(20):
        p = problem("goods_exchange", 1, seed)
        people, goods = p.state["people"], p.state["goods"]
        right = dict(zip(p.answer.split()[::2], p.answer.split()[1::2]))
        for held in itertools.product(goods, repeat=len(people)):
            pairs = [f"{person}: {thing}" for person, thing in zip(people, held)]
            is_right = dict(zip(people, held)) == right
            assert accepts(p, ", ".join(pairs)) == is_right
            assert accepts(p, " ".join(reversed(pairs))) == is_right
        first = p.answer.split()[:2]
        assert not accepts(p, " ".join(first))
        assert not accepts(p, f"{p.answer} {' '.join(first)}")
        assert not accepts(p, str(right))  # a Python literal is not parsed, let alone evaluated


def test_word_sorting_takes_only_the_one_order() -> None:
    for level, seed in itertools.product((1, 3, 5), range(10)):
        p = problem("word_sorting", level, seed)
        words = p.answer.split(", ") if "," in p.answer else p.answer.split()
        separator = ", " if level == 3 else " "
        for order in itertools.permutations(words):
            assert accepts(p, separator.join(order)) == (list(order) == words)
            assert accepts(p, ",".join(word.replace(" ", "") for word in order)) == (list(order) == words)
    p = Problem("word_sorting", "", "a b, c d", "", 2, {"solution": "a b, c d"})
    assert accepts(p, "ab cd") and accepts(p, "ab, cd") and accepts(p, " a b ,c d ")
    for text in ("a b c d", "a, b c d", "a b, c d,", ", a b, c d", "abcd", "a b, , c d"):
        assert not accepts(p, text), text


def test_place_must_be_named_alone() -> None:
    p = problem("space_reasoning")
    for label in "abcdefghij":
        assert accepts(p, label) == (label == p.answer)
    for text in (f"{p.answer}.", f"place {p.answer}", p.answer.upper(), f"{p.answer} {p.answer}"):
        assert not accepts(p, text)


def test_nothing_evaluates_prints_or_imports_at_run_time(capsys: pytest.CaptureFixture[str]) -> None:
    files = list(Path(logic.__file__).parent.rglob("*.py"))
    assert {f"{name}.py" for name in TASKS} | {"base.py", "judging.py"} <= {file.name for file in files}
    for file in files:
        calls = {
            n.func.id
            for n in ast.walk(ast.parse(file.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, file
        assert "print" not in calls or file.name == "__main__.py"
    for name in TASKS:
        p = problem(name)
        accepts(p, "__import__('os').getcwd()")
        score(p.row(with_response=False), chat.render_response("x", p.answer))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_score_reads_the_answer_block_alone(name: str) -> None:
    p = problem(name)
    content = p.row(with_response=True)
    assert content.response is not None
    good, bad = Verdict(1.0, correct=True, formatted=True), Verdict(0.0, correct=False, formatted=True)
    nothing = Verdict(0.0, correct=False, formatted=False)
    assert score(content, content.response) == good
    assert score(content, content.response.removesuffix(chat.END_OF_TURN)) == good
    assert score(content, chat.render_response("whatever", p.answer)) == good
    assert score(content, chat.render_response(p.answer, "?")) == bad
    assert score(content, chat.render_response(p.reasoning, "")) == bad
    for text in (
        "",
        p.answer,
        f"<answer>{p.answer}</answer>",
        f"<think><answer>{p.answer}</answer></think>",
        f"<think><answer>{p.answer}</answer></think><answer>?</answer>",
        f"<think>x</think><answer>?</answer><answer>{p.answer}</answer>",
        f"<think>x</think><answer>{p.answer}",
        f"<think>x<answer>{p.answer}</answer>",
        f"<think>x</think><answer>{p.answer}</answer> and more",
    ):
        assert score(content, text) == nothing, text
    asked = [(content, content.response), (content, ""), (content, chat.render_response("", "?"))]
    assert RuleJudge().judge(asked) == [good, nothing, bad], "in the order of what is asked"


@settings(max_examples=200, deadline=None)
@given(text=MODEL_TEXT, tags=st.lists(st.sampled_from([*chat.ADDED_TOKENS, *chat.SPECIAL_TOKENS]), max_size=6))
def test_score_never_raises(text: str, tags: list[str]) -> None:
    content = problem("web_of_lies").row(with_response=False)
    mixed = text.join(["", *tags, ""])
    result = score(content, mixed)
    assert result.formatted or not result.correct
