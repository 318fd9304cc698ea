"""Boolean expressions: which of several options are true."""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import NONE, Knobs, State, Task, parse_set

LABELS = "ABCDEGHI"
WORDS = {True: "T", False: "F"}


def _level(options: int, depth: int, full: bool, group_not: float) -> Knobs:
    return {"options": options, "depth": depth, "full": full, "group_not": group_not}


class BooleanExpressions(Task):
    """Each option is a tree of `and` and `or` over the constants T and F, any of which may be negated.

    Knobs: number of `options`; `depth` of each tree; `full` trees have groups on both sides of an operator, others
    on one side only; a group is negated with probability `group_not`. Groups carry parentheses, so precedence
    never matters.
    """

    name = "boolean_expressions"
    about = "Name the options whose Boolean expression is true."
    answer_format = 'letters of the true options in any order, or "none"'
    templates = ("Which are T? {}", "Find the T ones. {}")
    levels = (
        _level(3, 1, True, 0.0),
        _level(3, 2, False, 0.0),
        _level(3, 2, True, 0.2),
        _level(4, 2, True, 0.3),
        _level(5, 3, False, 0.3),
        _level(4, 3, True, 0.3),
        _level(5, 3, True, 0.4),
        _level(6, 3, True, 0.5),
        _level(7, 3, True, 0.5),
        _level(6, 4, True, 0.5),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        while True:
            options = [_tree(rng, knobs["depth"], knobs) for _ in range(knobs["options"])]
            if len({str(option) for option in options}) == len(options):
                return {"options": options}

    def describe(self, state: State) -> str:
        return "; ".join(f"{label}: {_text(tree)}" for label, tree in zip(LABELS, state["options"]))

    def solve(self, state: State) -> tuple[str, str]:
        lines, true = [], []
        for label, tree in zip(LABELS, state["options"]):
            steps: list[str] = []
            if _evaluate(tree, steps):
                true.append(label)
            lines.append(f"{label}: {', '.join(steps)}")
        return "; ".join(lines), " ".join(true) or NONE

    def parse(self, answer: str) -> Any | None:
        return parse_set(answer)


# A tree is [negated, constant] or [negated, left, operator, right]; lists, so that it survives JSON.
def _tree(rng: random.Random, depth: int, knobs: Knobs, root: bool = True) -> list[Any]:
    if depth == 0:
        return [rng.random() < 0.4, rng.random() < 0.5]
    depths = [depth - 1, depth - 1 if knobs["full"] else 0]
    rng.shuffle(depths)
    left, right = (_tree(rng, d, knobs, root=False) for d in depths)
    negated = not root and rng.random() < knobs["group_not"]
    return [negated, left, rng.choice(["and", "or"]), right]


def _text(tree: list[Any], root: bool = True) -> str:
    prefix = "not " if tree[0] else ""
    if len(tree) == 2:
        return prefix + WORDS[tree[1]]
    inside = f"{_text(tree[1], False)} {tree[2]} {_text(tree[3], False)}"
    return inside if root else f"{prefix}( {inside} )"


def _evaluate(tree: list[Any], steps: list[str]) -> bool:
    """Value of a tree; appends one equation per operator, constants as they stand, and one per negated group."""
    if len(tree) == 2:
        return tree[0] != tree[1]
    left, right = _evaluate(tree[1], steps), _evaluate(tree[3], steps)
    value = (left and right) if tree[2] == "and" else (left or right)
    quoted = [_text(side) if len(side) == 2 else WORDS[result] for side, result in ((tree[1], left), (tree[3], right))]
    steps.append(f"{quoted[0]} {tree[2]} {quoted[1]} = {WORDS[value]}")
    if tree[0]:
        steps.append(f"not {WORDS[value]} = {WORDS[not value]}")
    return tree[0] != value


TASK = BooleanExpressions()
