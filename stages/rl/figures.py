"""Figures of an RL stage, from its metrics log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from m1 import figures
from m1.config.families import RlSwe, named
from m1.config.rl import Rl
from m1.run.contract import StageContext

#: (rollout, training) probabilities of tokens, of equal length.
ProbabilityPairs = tuple[list[float], list[float]]


def draw(
    context: StageContext[Rl], before: Mapping[str, float], after: Mapping[str, float], pairs: ProbabilityPairs
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
        lines = {label: context.series(name) for label, name in names.items()}
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
    drawn += [
        _resolved(context, name) for name in named(context.section, RlSwe) if context.series(f"{name}/resolved")[0]
    ]
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


def _resolved(context: StageContext[Rl], family: str) -> Path:
    """Share of a family's responses that solve their task, one line for each of its tasks."""
    prefix = f"{family}/resolved/"
    names = {name for line in context.read_metrics() for name in line.metrics if name.startswith(prefix)}
    lines = {name.removeprefix(prefix): context.series(name) for name in sorted(names)}
    title = f"Tasks of the family {family}"
    path = context.figures_dir() / f"{family}_resolved.png"
    return figures.curve(path, lines, title, "step (batch of rollouts)", "share resolved")
