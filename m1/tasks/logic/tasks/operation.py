"""Operation: symbols are given new meanings, then an expression with them is evaluated."""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task, parse_integer
from m1.tasks.logic.tasks.arithmetic import calculate

SYMBOLS = "#@$&"


def _level(symbols: int, uses: int, factor: int, constant: int, condition: float, low: int, high: int) -> Knobs:
    return {
        "symbols": symbols, "uses": uses, "factor": factor, "constant": constant, "condition": condition,
        "low": low, "high": high,
    }  # fmt: skip


class Operation(Task):
    """A symbol stands for p*x +- q*y +- c; a conditional one exchanges x and y when x is below y.

    Knobs: number of new `symbols`; how often one is `uses`d, nested to the left with parentheses; `factor` bounds p
    and q (1 leaves them out), `constant` bounds c; `condition` is the share of conditional symbols; every
    intermediate value lies in `low`..`high`.
    """

    name = "operation"
    about = "Evaluate an expression of symbols that were given new meanings."
    answer_format = "an integer"
    templates = ("Let {}", "Given {}")
    levels = (
        _level(1, 1, 1, 9, 0.0, 0, 10),
        _level(1, 2, 1, 9, 0.0, 0, 9),
        _level(1, 2, 1, 9, 0.0, 0, 20),
        _level(1, 2, 4, 9, 0.0, 0, 99),
        _level(2, 3, 4, 9, 0.3, -99, 199),
        _level(2, 4, 5, 19, 0.3, -999, 1999),
        _level(3, 4, 6, 19, 0.4, -1999, 3999),
        _level(3, 5, 6, 19, 0.5, -9999, 19999),
        _level(4, 5, 7, 29, 0.5, -9999, 29999),
        _level(4, 6, 7, 29, 0.5, -99999, 199999),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        while True:
            definitions = {
                symbol: {
                    "p": rng.randint(1, knobs["factor"]), "q": rng.randint(1, knobs["factor"]),
                    "signs": [rng.choice("+-"), rng.choice("+-")], "c": rng.randint(1, knobs["constant"]),
                    "swaps": rng.random() < knobs["condition"],
                }
                for symbol in rng.sample(SYMBOLS, knobs["symbols"])
            }  # fmt: skip
            numbers = [rng.randint(1, 9) for _ in range(knobs["uses"] + 1)]
            names = [*definitions, *(rng.choice([*definitions]) for _ in range(knobs["uses"] - len(definitions)))]
            rng.shuffle(names)
            state = {"definitions": definitions, "numbers": numbers, "names": names[: knobs["uses"]]}
            if all(knobs["low"] <= value <= knobs["high"] for step in _steps(state) for value in step[1]):
                return state

    def describe(self, state: State) -> str:
        meanings = [
            f"x{symbol}y={_form(d, 'x', 'y')}" + (" or swapped if x<y" if d["swaps"] else "")
            for symbol, d in state["definitions"].items()
        ]
        expression = str(state["numbers"][0])
        for use, (symbol, number) in enumerate(zip(state["names"], state["numbers"][1:])):
            expression = f"({expression}){symbol}{number}" if use else f"{expression}{symbol}{number}"
        return f"{'; '.join(meanings)}. Find {expression}"

    def solve(self, state: State) -> tuple[str, str]:
        steps = _steps(state)
        return ";".join(text for text, _ in steps), str(steps[-1][1][-1])

    def parse(self, answer: str) -> Any | None:
        return parse_integer(answer)


def _form(definition: dict[str, Any], x: Any, y: Any) -> str:
    """The right-hand side with x and y put in; negative numbers get parentheses."""
    x, y = (f"({v})" if isinstance(v, int) and v < 0 else str(v) for v in (x, y))
    left = x if definition["p"] == 1 else f"{definition['p']}*{x}"
    right = y if definition["q"] == 1 else f"{definition['q']}*{y}"
    first, second = definition["signs"]
    return f"{left}{first}{right}{second}{definition['c']}"


def _steps(state: State) -> list[tuple[str, list[int]]]:
    """For every use of a symbol, the worked text and its intermediate values, the last being the result."""
    steps = []
    value = state["numbers"][0]
    for symbol, y in zip(state["names"], state["numbers"][1:]):
        definition = state["definitions"][symbol]
        x = value
        text = f"{x}{symbol}{y}="
        if definition["swaps"] and x < y:
            x, y = y, x
        first, second = definition["signs"]
        left, right, constant = definition["p"] * x, definition["q"] * y, definition["c"]
        middle = calculate(left, first, right)
        value = calculate(middle, second, constant)
        text += f"{_form(definition, x, y)}="
        if definition["p"] > 1 or definition["q"] > 1:
            text += f"{left}{first}{right if right >= 0 else f'({right})'}{second}{constant}="
        text += f"{middle}{second}{constant}={value}"
        steps.append((text, [left, right, middle, value]))
    return steps


TASK = Operation()
