"""Rows of generated problems for a data set."""

from __future__ import annotations

from dataclasses import replace

from pydantic import JsonValue

from m1 import chat
from m1.config.sft_data import SftData
from m1.config.synthesize import Synthesize
from m1.config.tasks import TaskRange
from m1.errors import UsageError
from m1.tasks.base import Made, Row, Wish
from m1.tasks.logic.draw import draw, tally

EMPTY_THINK = chat.THINK_OPEN + chat.THINK_CLOSE
#: Share of the worked answers on which the loss is only measured.
HELDOUT_FRACTION = 0.02


def make(wish: Wish) -> Made:
    """Rows of `wish.purpose`; for the cold start a share of them (fixed by content) has the bare answer alone.

    Raises:
        UsageError: too few different problems.
    """
    tasks, per_task, direct = _wanted(wish)
    purpose = f"{wish.purpose}/{wish.split}"
    problems = draw(tasks, per_task, seed=wish.profile.seed, purpose=purpose, taken=wish.taken)
    rows = [problem.row(with_response=wish.purpose == "sft-data") for problem in problems]
    counts: dict[str, JsonValue] = {"rows": len(rows), "by_task_and_difficulty": tally(problems)}
    if wish.purpose == "sft-data":
        rows = [_direct(row) if _is_direct(row, direct) else row for row in rows]
        counts["direct"] = sum((row.response or "").startswith(EMPTY_THINK) for row in rows)
    return Made(rows, counts)


def _wanted(wish: Wish) -> tuple[dict[str, TaskRange], int, float]:
    """Tasks, rows wanted of each, and the share of them without reasoning."""
    if wish.purpose == "sft-data":
        sft = wish.profile.section("sft-data", SftData)
        if sft.samples_per_task < 2:
            raise UsageError("sft-data.samples_per_task=1 leaves nothing to hold out", "Ask for at least 2.")
        heldout = max(1, round(sft.samples_per_task * HELDOUT_FRACTION))
        count = heldout if wish.split == "heldout" else sft.samples_per_task - heldout
        return sft.tasks, count, sft.direct_fraction
    made = wish.profile.section("synthesize", Synthesize)
    count = made.heldout_prompts_per_task if wish.split == "heldout" else made.train_prompts_per_task
    return made.tasks, count, 0.0


def _is_direct(row: Row, fraction: float) -> bool:
    return int(row.id, 16) / 16 ** len(row.id) < fraction


def _direct(row: Row) -> Row:
    """The row with the bare answer, no reasoning before it."""
    return replace(row, response=chat.render_response("", f" {row.answer}"))
