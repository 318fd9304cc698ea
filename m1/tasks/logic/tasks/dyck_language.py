"""Dyck language: close every open bracket of a sequence, in the right order."""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _level(length: int, *open_: int) -> Knobs:
    return {"length": length, "open": list(open_)}


class DyckLanguage(Task):
    """The prefix of a well-formed sequence over four types of brackets is given, the rest is asked for.

    The reasoning writes the depth after every bracket, then goes down depth by depth and closes what is open there.

    Knobs: `length` of the prefix; how many brackets are `open` at its end, one of the numbers given.
    """

    name = "dyck_language"
    about = "Complete a sequence of brackets so that it is well formed."
    answer_format = "the missing closing brackets in order"
    templates = ("Close the list: {}", "Complete: {}")
    levels = (
        _level(6, 2, 4),
        _level(8, 2, 4),
        _level(10, 4),
        _level(14, 4),
        _level(18, 4),
        _level(22, 6),
        _level(26, 6),
        _level(32, 8),
        _level(40, 8),
        _level(48, 10),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        while True:
            closers = (knobs["length"] - rng.choice(knobs["open"])) // 2
            moves = [True] * (knobs["length"] - closers) + [False] * closers
            rng.shuffle(moves)
            stack: list[str] = []
            sequence = []
            for opening in moves:
                if not opening and not stack:
                    break
                if opening:
                    stack.append(rng.choice([*PAIRS]))
                    sequence.append(stack[-1])
                else:
                    sequence.append(PAIRS[stack.pop()])
            else:
                return {"sequence": sequence}

    def describe(self, state: State) -> str:
        return " ".join(state["sequence"])

    def solve(self, state: State) -> tuple[str, str]:
        stack: list[str] = []
        trace = ""
        for bracket in state["sequence"]:
            if bracket in PAIRS:
                stack.append(bracket)
                trace += f"{bracket}{len(stack)}"
            else:
                trace += f"{bracket}{len(stack) - 1}"
                stack.pop()
        closing = [PAIRS[bracket] for bracket in reversed(stack)]
        trace += ":" + "".join(f"{depth}{bracket}" for depth, bracket in zip(range(len(stack), 0, -1), closing))
        return trace, " ".join(closing)

    def parse(self, answer: str) -> Any | None:
        return "".join(answer.split()) or None


TASK = DyckLanguage()
