"""Figures of the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from m1 import figures
from m1.config.evaluate import Evaluate
from m1.config.families import PLAIN
from m1.run.contract import StageContext
from m1.tasks.pass_rate import Accuracy


def draw(context: StageContext[Evaluate], family: str, table: Mapping[str, Mapping[str, Accuracy]]) -> Path:
    """pass@1 of one family by task and checkpoint."""
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    tasks.sort(key=lambda task: task == "mean")
    series = {stage: [_value(row.get(task)) for task in tasks] for stage, row in table.items()}
    name = "pass_at_1.png" if family == PLAIN else f"{family}_pass_at_1.png"
    of_what = "" if family == PLAIN else f" of the family {family}"
    title = f"Held-out accuracy{of_what} by task and checkpoint"
    return figures.bars_by_group(context.figures_dir() / name, tasks, series, title, "pass@1")


def _value(entry: Accuracy | None) -> float:
    return math.nan if entry is None or entry.value is None else entry.value
