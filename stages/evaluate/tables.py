"""Accuracy of several checkpoints by task, as metrics, as JSON and as sentences."""

from __future__ import annotations

from collections.abc import Mapping

from m1.config.families import PLAIN
from m1.tasks.pass_rate import MEAN, Accuracy

#: Checkpoint's stage -> task -> accuracy; the last task is `MEAN`.
Tables = dict[str, Mapping[str, Accuracy]]


def final_metrics(family: str, table: Mapping[str, Mapping[str, Accuracy]], *, errors: bool = True) -> dict[str, float]:
    """pass@1 by checkpoint and task; what was not judged has no value.

    Args:
        errors: with the standard errors of the means.
    """
    name = "pass@1" if family == PLAIN else f"{family}/pass@1"
    metrics = {
        f"{name}/{stage}/{task}": entry.value
        for stage, row in table.items()
        for task, entry in row.items()
        if entry.value is not None
    }
    if errors:
        metrics |= {f"{name}_error/{stage}": row[MEAN].standard_error for stage, row in table.items()}
    if family != PLAIN:
        metrics |= {f"{family}/unjudged/{stage}": float(row[MEAN].unjudged) for stage, row in table.items()}
    return metrics


def as_json(table: Mapping[str, Mapping[str, Accuracy]]) -> dict[str, object]:
    """The table as it is stored."""
    return {
        stage: {
            task: {
                "pass@1": entry.value,
                "standard_error": entry.standard_error,
                "interval_95": list(entry.interval) if entry.interval else None,
                "prompts": entry.prompts,
                "reward": entry.reward,
                "ends": dict(entry.ends),
                "unjudged": entry.unjudged,
            }
            for task, entry in row.items()
        }
        for stage, row in table.items()
    }


def sentences(family: str, table: Mapping[str, Mapping[str, Accuracy]]) -> list[str]:
    """One line for each checkpoint, for the report."""
    return [_sentence(family, stage, row) for stage, row in table.items()]


def _sentence(family: str, stage: str, row: Mapping[str, Accuracy]) -> str:
    mean = row[MEAN]
    start = stage if family == PLAIN else f"{family}: {stage}"
    if mean.value is None or mean.interval is None:
        return f"{start}: nothing was judged"
    text = f"{start}: pass@1 {mean.value:.3f}, 95% interval {mean.interval[0]:.3f} to {mean.interval[1]:.3f}"
    if mean.ends:
        text += f" ({', '.join(f'{end} {count}' for end, count in mean.ends)})"
    if mean.unjudged:
        text += f"; {mean.unjudged} answers could not be judged and do not count"
    return text
