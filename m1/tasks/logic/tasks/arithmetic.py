"""Integer maths: a chain of additions, subtractions and multiplications, worked one operation at a time."""

from __future__ import annotations

import itertools
import random
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task, parse_integer


def calculate(left: int, operator: str, right: int) -> int:
    """One binary operation of the three this task knows."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _level(terms: int, products: int, first: int, operand: int, low: int, high: int) -> Knobs:
    return {"terms": terms, "products": products, "first": first, "operand": operand, "low": low, "high": high}


class Arithmetic(Task):
    """Operators alternate with non-negative numbers; multiplication binds first, the rest goes left to right.

    Knobs: `terms` numbers, of which `products` are joined to their left neighbour by a multiplication of two
    one-digit numbers (from level 6, two-digit by one-digit); `first` and `operand` bound the numbers; every running
    total lies in `low`..`high`.
    """

    name = "arithmetic"
    about = "Evaluate a chain of +, - and * over integers."
    answer_format = "an integer"
    templates = ("Compute {}", "What is {}?")
    levels = (
        _level(4, 0, 9, 5, 0, 9),
        _level(4, 0, 9, 9, 0, 20),
        _level(4, 0, 99, 9, 0, 99),
        _level(5, 1, 9, 9, 0, 99),
        _level(6, 1, 99, 99, -99, 199),
        _level(7, 2, 99, 99, -199, 299),
        _level(8, 2, 999, 99, -999, 1999),
        _level(9, 3, 999, 999, -2999, 2999),
        _level(11, 4, 9999, 999, -9999, 19999),
        _level(12, 4, 9999, 9999, -49999, 49999),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        while True:
            numbers = [rng.randint(1, knobs["first"])]
            numbers += [rng.randint(1, knobs["operand"]) for _ in range(knobs["terms"] - 1)]
            operators = [rng.choice("+-") for _ in numbers[1:]]
            for place in rng.sample(range(len(operators)), knobs["products"]):
                operators[place] = "*"
                numbers[place] = rng.randint(2, 99 if knobs["terms"] > 7 else 9)
                numbers[place + 1] = rng.randint(2, 9)
            if any(pair == ("*", "*") for pair in itertools.pairwise(operators)):
                continue
            state = {"numbers": numbers, "operators": operators}
            if all(knobs["low"] <= total <= knobs["high"] for *_, total in _steps(state)):
                return state

    def describe(self, state: State) -> str:
        return str(state["numbers"][0]) + "".join(
            f"{operator}{number}" for operator, number in zip(state["operators"], state["numbers"][1:])
        )

    def solve(self, state: State) -> tuple[str, str]:
        steps = _steps(state)
        products = state["operators"].count("*")
        worked = [f"{left}{operator}{right}={total}" for left, operator, right, total in steps]
        # After the first sum, what is to the left of the operator is the total just written.
        worked[products + 1 :] = [f"{operator}{right}={total}" for _, operator, right, total in steps[products + 1 :]]
        return ";".join(worked), str(steps[-1][-1])

    def parse(self, answer: str) -> Any | None:
        return parse_integer(answer)


def _steps(state: State) -> list[tuple[int, str, int, int]]:
    """Every operation in order: the products first, then the sums from left to right."""
    numbers, operators = [state["numbers"][0]], []
    steps = []
    for operator, number in zip(state["operators"], state["numbers"][1:]):
        if operator == "*":
            product = numbers[-1] * number
            steps.append((numbers[-1], operator, number, product))
            numbers[-1] = product
        else:
            operators.append(operator)
            numbers.append(number)
    total = numbers[0]
    for operator, number in zip(operators, numbers[1:]):
        result = calculate(total, operator, number)
        steps.append((total, operator, number, result))
        total = result
    return steps


TASK = Arithmetic()
