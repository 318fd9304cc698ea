"""Generators: right answers by a second solver, honest reasoning, dials that turn, enough different problems."""

from __future__ import annotations

import itertools
import json
import math
import random
import re

import pytest
from oracles import ORACLES

from m1 import chat
from m1.config.tasks import TaskRange
from m1.tasks.logic import LEVELS, TASKS, Problem
from m1.tasks.logic.draw import draw

CASES = [(name, level) for name in TASKS for level in LEVELS]


def problems(name: str, level: int, count: int, seed: int = 7) -> list[Problem]:
    rng = random.Random(seed)
    return [TASKS[name].generate(rng, level) for _ in range(count)]


def test_every_task_has_an_oracle() -> None:
    assert set(ORACLES) == set(TASKS)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_answer_agrees_with_a_second_solver(name: str, level: int) -> None:
    # Brute force over liars doubles with every person: fewer of the large ones.
    count = 2 if name == "web_of_lies" and level > 7 else 12 if level > 5 else 60
    for problem in problems(name, level, count):
        expected = ORACLES[name](problem.question)
        assert TASKS[name].verify(problem.state, expected), problem
        assert TASKS[name].verify(problem.state, problem.answer), problem


@pytest.mark.parametrize(("name", "level"), CASES)
def test_problem_is_plain_json_and_renders_to_a_well_formed_response(name: str, level: int) -> None:
    for problem in problems(name, level, 5):
        assert problem.difficulty == level and problem.task == name
        assert problem.question.isascii() and problem.reasoning.isascii()
        assert json.loads(json.dumps(problem.state)) == problem.state
        assert TASKS[name].word({k: v for k, v in problem.state.items() if k != "solution"}) == problem.question
        parsed = chat.parse_response(chat.render_response(problem.reasoning, problem.answer))
        assert parsed == (problem.reasoning, problem.answer)


@pytest.mark.parametrize("name", ["operation", "object_counting", "boolean_expressions"])
def test_every_equation_of_the_reasoning_holds(name: str) -> None:
    names = {"T": True, "F": False}
    total = None
    for level in LEVELS:
        for problem in problems(name, level, 20):
            equations = 0
            steps = re.split(r"[;,]\s*|\s(?=[a-z]+[+-][0-9])", re.sub(r"[A-I]: ", "", problem.reasoning))
            for step in steps:
                if name == "object_counting":  # "key+3=7": the total before, plus 3, is 7
                    change, _, after = re.sub(r"^[a-z]+", "", step).partition("=")
                    total = 0 if step is steps[0] else total
                    total += int(change) if after else 0
                    assert not after or total == int(after), problem
                    equations += bool(after)
                    continue
                sides = [side for side in step.split("=") if not re.search(r"[#@$&]", side)]
                assert len({eval(side, {}, names) for side in sides}) == 1, (step, problem)
                equations += len(sides) > 1
            assert equations > 0


def test_arithmetic_reasoning_uses_one_operation_at_a_time() -> None:
    for level in LEVELS:
        for problem in problems("arithmetic", level, 20):
            steps = problem.reasoning.split(";")
            products = problem.question.count("*")
            assert len(steps) == TASKS["arithmetic"].knobs(level)["terms"] - 1
            total = None
            for place, step in enumerate(steps):
                left, operator, right, result = re.fullmatch(r"(-?\d+)?([+*-])(\d+|-\d+)=(-?\d+)", step).groups()
                assert (operator == "*") == (place < products)
                assert (left is None) == (place > products)  # later sums continue the total
                total = eval(f"({total if left is None else left}){operator}({right})")
                assert total == int(result), problem
            assert result == problem.answer


def test_dyck_reasoning_counts_depth() -> None:
    for level in LEVELS:
        for problem in problems("dyck_language", level, 20):
            trace, closing = problem.reasoning.split(":")
            depth = 0
            for bracket, written in re.findall(r"([^\d])(\d+)", trace):
                depth += 1 if bracket in "([{<" else -1
                assert depth == int(written)
            assert re.sub(r"\d", "", closing) == problem.answer.replace(" ", "")
            assert [int(d) for d in re.findall(r"\d+", closing)] == list(range(depth, 0, -1))


def test_generation_is_a_function_of_the_seed() -> None:
    for name in TASKS:
        assert problems(name, 3, 10, seed=1) == problems(name, 3, 10, seed=1)
        assert problems(name, 3, 10, seed=1) != problems(name, 3, 10, seed=2)


def test_both_wordings_are_used_and_content_decides_which() -> None:
    for name, task in TASKS.items():
        starts = {template.split("{")[0] for template in task.templates}
        seen = {next(s for s in starts if p.question.startswith(s)) for p in problems(name, 2, 60)}
        assert seen == starts


@pytest.mark.parametrize("name", sorted(TASKS))
def test_difficulty_makes_problems_longer_and_bad_levels_are_refused(name: str) -> None:
    task = TASKS[name]
    lengths = [sum(len(p.question + p.reasoning) for p in problems(name, level, 60)) for level in LEVELS]
    # The first two levels of some tasks differ in their alphabet or in the size of numbers only, and from level 5
    # words are no longer spelled out.
    for level in range(2, 10):
        assert lengths[level] > lengths[level - 1] or (name, level + 1) == ("word_sorting", 5)
    assert lengths[1] >= 0.97 * lengths[0]
    assert len({json.dumps(task.knobs(level)) for level in LEVELS}) == len(LEVELS)
    for level in (0, 11, -1):
        with pytest.raises(ValueError, match=name):
            task.knobs(level)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_each_low_level_has_many_different_problems(name: str) -> None:
    for level, count in ((1, 1200), (2, 900), (3, 900)):
        span = {name: TaskRange(min_difficulty=level, max_difficulty=level)}
        taken: set[str] = set()
        drawn = draw(span, count, seed=3, purpose="test", taken=taken)
        assert len(taken) == len({p.question for p in drawn}) == count


def test_the_smallest_levels_have_3000_problems() -> None:
    digits, signs = range(1, 10), (1, -1)
    chains = 0
    for first, changes in itertools.product(digits, itertools.product([*range(-5, 0), *range(1, 6)], repeat=3)):
        chains += all(0 <= total <= 9 for total in itertools.accumulate(changes, initial=first))
    assert chains == 3403
    meanings = 0
    for x, y, c, first, second in itertools.product(digits, digits, digits, signs, signs):
        middle = x + first * y
        meanings += 4 * (0 <= middle <= 10 and 0 <= middle + second * c <= 10)
    assert meanings == 3528
    for name, exact in (("arithmetic", chains), ("operation", meanings)):
        found = {p.question for p in problems(name, 1, 1500)}
        expected = exact * (1 - math.exp(-1500 / exact))  # if every problem is as likely
        assert abs(len(found) - expected) < 60


def test_options_of_one_boolean_problem_differ() -> None:
    for level in LEVELS:
        for problem in problems("boolean_expressions", level, 20):
            texts = [part.split(": ")[1] for part in re.split(r"[?.] ", problem.question, maxsplit=1)[1].split("; ")]
            assert len(set(texts)) == len(texts)


def test_places_and_words_are_distinct() -> None:
    for level in LEVELS:
        for problem in problems("space_reasoning", level, 10):
            assert len({tuple(p) for p in problem.state["places"]}) == len(problem.state["places"])
        for problem in problems("word_sorting", level, 10):
            assert len(set(problem.state["words"])) == len(problem.state["words"])
            assert sorted(problem.state["alphabet"]) == sorted(set(problem.state["alphabet"]))


@pytest.mark.parametrize("name", ["boolean_expressions", "web_of_lies", "space_reasoning", "dyck_language"])
def test_no_single_answer_is_a_good_guess(name: str) -> None:
    for level in (1, 2, 3):
        answers = [p.answer for p in problems(name, level, 400)]
        assert max(answers.count(answer) for answer in set(answers)) / len(answers) < 0.35
