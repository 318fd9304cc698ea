"""Figures that every supervised stage draws from its metrics."""

from __future__ import annotations

from pathlib import Path

from m1 import figures
from m1.run.contract import StageContext


def training_figures(context: StageContext) -> list[Path]:
    """Loss and gradient norm by step; nothing on ranks other than 0."""
    if context.rank != 0:
        return []
    folder = context.figures_dir()
    loss = {"training": context.series("train/loss")}
    if (held_out := context.series("heldout/loss"))[0]:
        loss["held-out"] = held_out
    figures.curve(folder / "loss.png", loss, f"{context.stage}: loss", "step", "loss per token (nats)")
    norm = {"gradient norm": context.series("train/grad_norm")}
    figures.curve(folder / "gradient_norm.png", norm, f"{context.stage}: gradient norm", "step", "norm", log=True)
    return [folder / "loss.png", folder / "gradient_norm.png"]
