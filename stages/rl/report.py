"""Figures and final numbers of an RL stage, from its metrics log."""

from __future__ import annotations

from pathlib import Path

from m1 import figures
from m1.stage import StageContext
from m1.training.figures import series

#: Averaged over this many last steps for the final metrics.
LAST_STEPS = 5


def final_metrics(context: StageContext, after: dict[str, float]) -> dict[str, float]:
    """Held-out pass@1 at the end and, on rank 0, step metrics averaged over the last steps."""
    metrics = {f"heldout/pass@1/{task}": value for task, value in after.items()}
    if context.rank == 0:
        names = {name for line in context.read_metrics() for name in line["metrics"] if not name.startswith("heldout/")}
        for name in sorted(names):
            values = series(context, name)[1][-LAST_STEPS:]
            metrics[name] = sum(values) / len(values)
    return metrics


def draw(
    context: StageContext, before: dict[str, float], after: dict[str, float], pairs: tuple[list[float], list[float]]
) -> list[Path]:
    """Draw the stage's figures (rank 0).

    Args:
        before, after: held-out pass@1 by task.
        pairs: rollout and training probabilities of one step's tokens; may be empty after a resume.
    """
    if context.rank != 0:
        return []
    folder = context.figures_dir()
    step = "step (batch of rollouts)"

    def curves(file: str, title: str, ylabel: str, names: dict[str, str], log: bool = False) -> Path:
        lines = {label: series(context, name) for label, name in names.items()}
        return figures.curve(folder / file, lines, title, step, ylabel, log=log)

    drawn = [
        curves("reward.png", "Reward", "mean over responses", {"reward": "rl/reward", "correct": "rl/correct"}),
        curves(
            "response_length.png",
            "Response length",
            "tokens",
            {"mean": "rl/response_length", "99th percentile": "rl/response_length_p99", "window": "rl/window"},
        ),
        curves("heldout.png", "Held-out pass@1", "pass@1", {"mean over tasks": "heldout/pass@1/mean"}),
        curves("grad_norm.png", "Gradient norm", "norm before clipping", {"": "rl/grad_norm"}, log=True),
        curves("entropy.png", "Entropy of the rollouts", "nats per token", {"": "rl/entropy"}),
        curves(
            "agreement.png",
            "Rollout against training probabilities",
            "absolute difference",
            {"mean": "agreement/mean_abs_difference", "largest": "agreement/max_abs_difference"},
            log=True,
        ),
    ]
    if context.section.swe is not None and series(context, "swe/resolved")[0]:
        names = {kind: f"swe/resolved/{kind}" for kind in ("repair", "localise", "write-test")}
        shown = {kind: name for kind, name in names.items() if series(context, name)[0]}
        drawn.append(curves("swe_resolved.png", "Software-engineering tasks", "share resolved", shown))
    tasks = list(before)
    drawn.append(
        figures.bars_by_group(
            folder / "accuracy_by_task.png",
            tasks,
            {"before": [before[t] for t in tasks], "after": [after[t] for t in tasks]},
            "Held-out accuracy by task",
            "pass@1",
        )
    )
    if pairs[0]:
        drawn.append(figures.scatter(folder / "probabilities.png", *pairs))
    return drawn
