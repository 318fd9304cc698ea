"""Resolved rates of software-engineering tasks: table, metrics, sentences and figure of the evaluate stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m1 import figures
from m1.stage import StageContext, write_json

if TYPE_CHECKING:
    from stages.evaluate.swe import Answered

#: Order of the kinds of tasks, and all of them together.
NAMES = ("repair", "localise", "write-test", "all")


@dataclass(frozen=True)
class Resolved:
    """Resolved rate of one kind of task.

    Attributes:
        rate: mean over tasks of the share of judged answers that are right; None if none was judged.
        value: the same mean of the rewards, which for localisation count overlap.
        standard_error: of the rate, by the tasks drawn.
        tasks: with at least one judged answer.
        ends: how often each end came.
        unjudged: answers that the sandbox failed on.
    """

    rate: float | None
    value: float | None
    standard_error: float
    tasks: int
    ends: dict[str, int]
    unjudged: int


def resolved_by_kind(answered: Sequence[Answered]) -> dict[str, Resolved]:
    """By kind of task, and "all" for all tasks together."""
    table = {}
    for name in NAMES:
        items = [item for item in answered if name in (item.kind, "all")]
        judged = [kept for item in items if (kept := [v for v in item.verdicts if v.judged])]
        rates = [sum(v.resolved for v in kept) / len(kept) for kept in judged]
        values = [sum(v.value for v in kept) / len(kept) for kept in judged]
        ends = Counter(verdict.end for kept in judged for verdict in kept)
        unjudged = sum(not verdict.judged for item in items for verdict in item.verdicts)
        if not items:
            continue
        rate = sum(rates) / len(rates) if rates else None
        variance = sum((value - (rate or 0.0)) ** 2 for value in rates) / max(1, len(rates) - 1)
        error = math.sqrt(variance / len(rates)) if rates else 0.0
        value = sum(values) / len(values) if values else None
        table[name] = Resolved(rate, value, error, len(rates), dict(ends.most_common()), unjudged)
    return table


def metrics(stage: str, kinds: Mapping[str, Resolved]) -> dict[str, float]:
    """Of one checkpoint; a kind of which nothing was judged has no rate."""
    found = {f"swe_resolved/{stage}/{name}": row.rate for name, row in kinds.items() if row.rate is not None}
    return {**found, f"swe_unjudged/{stage}": float(kinds["all"].unjudged)}


def sentence(stage: str, kinds: Mapping[str, Resolved]) -> str:
    """One line for the report."""
    rates = [f"{name} {row.rate:.3f} of {row.tasks}" for name, row in kinds.items() if row.rate is not None]
    ends = ", ".join(f"{end} {count}" for end, count in kinds["all"].ends.items())
    text = f"swe: {stage}: resolved {'; '.join(rates) or 'unknown'} ({ends or 'nothing was judged'})"
    lost = kinds["all"].unjudged
    return text + f"; the sandbox failed on {lost} answers, which do not count" * bool(lost)


def write(context: StageContext, table: Mapping[str, Mapping[str, Resolved]], said: Sequence[str]) -> list[Path]:
    """`swe.json`, which also says why there are no numbers where there are none; the figure, if there is one."""
    plain = {stage: {name: asdict(row) for name, row in kinds.items()} for stage, kinds in table.items()}
    write_json(context.output / "swe.json", {"notes": list(said), "checkpoints": plain})
    if not table:
        return []
    names = [name for name in NAMES if any(name in kinds for kinds in table.values())]
    series = {
        stage: [math.nan if name not in kinds or (rate := kinds[name].rate) is None else rate for name in names]
        for stage, kinds in table.items()
    }
    file = context.figures_dir() / "swe_resolved.png"
    title = "Software-engineering tasks of held-out packages"
    return [figures.bars_by_group(file, names, series, title, "share resolved")]
