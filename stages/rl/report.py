"""Final numbers of an RL stage, from its metrics log."""

from __future__ import annotations

from collections.abc import Mapping

from m1.config.rl import Rl
from m1.run.contract import StageContext

#: Averaged over this many last steps for the final metrics.
LAST_STEPS = 5


def final_metrics(context: StageContext[Rl], after: Mapping[str, float]) -> dict[str, float]:
    """Held-out pass@1 at the end and, on rank 0, step metrics averaged over the last steps."""
    metrics = {f"heldout/pass@1/{task}": value for task, value in after.items()}
    if context.rank == 0:
        names = {name for line in context.read_metrics() for name in line.metrics if not name.startswith("heldout/")}
        for name in sorted(names):
            values = context.series(name)[1][-LAST_STEPS:]
            metrics[name] = sum(values) / len(values)
    return metrics
