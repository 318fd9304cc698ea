"""Draw sets of problems that have no content in common, and write them as JSON lines."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1 import chat
from m1.errors import UsageError
from m1.profile import TaskRange
from stages.synthesize.tasks import TASKS, Problem

#: Keys of every row; rows of sft-data have "response" too.
FIELDS = ("id", "task", "difficulty", "question", "prompt", "answer", "state")

#: Draws in a row that give nothing new before a level counts as exhausted.
PATIENCE = 2000


def check_tasks(tasks: Mapping[str, TaskRange], section: str) -> None:
    """Refuse an empty mapping and task names nobody generates.

    Raises:
        UsageError: names the field and what is allowed.
    """
    if not tasks:
        raise UsageError(f"{section}.tasks is empty", f"Name at least one of: {', '.join(TASKS)}.")
    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"{section}.tasks: there is no task {name!r}", f"Choose from: {', '.join(TASKS)}.")


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


def row(problem: Problem, *, with_response: bool) -> dict[str, Any]:
    """A problem as one JSON object; the worked response only where it is asked for."""
    content = {
        "id": problem.id,
        "task": problem.task,
        "difficulty": problem.difficulty,
        "question": problem.question,
        "prompt": chat.render_prompt(problem.question),
        "answer": problem.answer,
        "state": problem.state,
    }
    if with_response:
        # A leading space: a symbol at the start then is the same token as elsewhere.
        content["response"] = chat.render_response(f" {problem.reasoning}", f" {problem.answer}")
    return content


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line; the file appears when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(content, sort_keys=True) + "\n" for content in rows)
    os.replace(temporary, path)


def read_ids(path: Path) -> set[str]:
    """The ids of a file of rows.

    Raises:
        UsageError: the file is missing or damaged.
    """
    mend = f"Make it again: python -m stages.sft_data --profile {path.parent.parent.name}."
    try:
        with open(path, encoding="utf-8") as file:
            return {json.loads(line)["id"] for line in file}
    except FileNotFoundError:
        raise UsageError(f"{path} is not there", mend) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error!r})", mend) from error


def tally(problems: list[Problem]) -> dict[str, dict[str, int]]:
    """Problems by task and level, for summaries."""
    counts: dict[str, dict[str, int]] = {}
    for problem in sorted(problems, key=lambda p: (p.task, p.difficulty)):
        levels = counts.setdefault(problem.task, {})
        levels[str(problem.difficulty)] = levels.get(str(problem.difficulty), 0) + 1
    return counts
