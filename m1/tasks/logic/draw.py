"""Draw sets of problems that have no content in common."""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Mapping

from pydantic import JsonValue

from m1.config.tasks import TaskRange
from m1.errors import UsageError
from m1.tasks.logic import TASKS, Problem

#: Draws in a row that give nothing new before a level counts as exhausted.
PATIENCE = 2000


def unknown_tasks(tasks: Mapping[str, TaskRange], field: str) -> list[str]:
    """What is wrong with a field that names tasks, one clause each."""
    if not tasks:
        return [f"{field} is empty; name at least one of {', '.join(TASKS)}"]
    clauses = []
    for name in tasks:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(TASKS)}"
            clauses.append(f"{field}: there is no task {name!r}; {hint}")
    return clauses


def draw(tasks: Mapping[str, TaskRange], per_task: int, *, seed: int, purpose: str, taken: set[str]) -> list[Problem]:
    """`per_task` new problems of every task, spread evenly over its levels, in shuffled order.

    Every (task, level) has its own random stream, so that neither another task nor another level changes its problems.

    Args:
        purpose: name of the stream; different purposes draw different problems.
        taken: ids that must not be drawn; the ids drawn are added.

    Raises:
        UsageError: a level has too few problems that are not taken.
    """
    problems: list[Problem] = []
    for name, span in tasks.items():
        levels = range(span.min_difficulty, span.max_difficulty + 1)
        for place, level in enumerate(levels):
            count = per_task // len(levels) + (place < per_task % len(levels))
            rng = random.Random(f"{seed}/{purpose}/{name}/{level}")
            problems += _new_problems(name, level, count, rng, taken)
    random.Random(f"{seed}/{purpose}/order").shuffle(problems)
    return problems


def _new_problems(name: str, level: int, count: int, rng: random.Random, taken: set[str]) -> list[Problem]:
    problems: list[Problem] = []
    misses = 0
    while len(problems) < count:
        problem = TASKS[name].generate(rng, level)
        if problem.id in taken:
            misses += 1
            if misses == PATIENCE:
                raise UsageError(
                    f"task {name}, difficulty {level}: too few different problems, {len(problems)} of {count} found "
                    "that are in no other set",
                    "Ask for fewer samples or prompts per task, or allow more levels.",
                )
            continue
        misses = 0
        taken.add(problem.id)
        problems.append(problem)
    return problems


def tally(problems: list[Problem]) -> dict[str, JsonValue]:
    """Problems by task and level, for summaries."""
    counts: dict[str, JsonValue] = {}
    for task in sorted({problem.task for problem in problems}):
        levels = Counter(problem.difficulty for problem in problems if problem.task == task)
        counts[task] = {str(level): levels[level] for level in sorted(levels)}
    return counts
