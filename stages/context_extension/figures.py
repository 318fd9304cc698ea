"""Figures of the context extension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m1 import figures
from m1.config.context_extension import ContextExtension
from m1.run.contract import StageContext


def draw(context: StageContext[ContextExtension], probes: list[dict[str, Any]]) -> list[Path]:
    """Held-out loss by position and retrieval by depth, one line per stage; gradient norms by layer."""
    folder = context.figures_dir()
    named = [("before", probes[0]), *((f"after {p['length']}", p) for p in probes[1:])]
    loss = {name: (p["positions"], p["loss_by_position"]) for name, p in named}
    figures.position_curve(folder / "loss_by_position.png", loss)
    depth = {name: ([10.0, 30.0, 50.0, 70.0, 90.0], p["by_depth"]) for name, p in named}
    figures.curve(
        folder / "retrieval_by_depth.png",
        depth,
        "Retrieval by depth",
        "depth of the fact (% of the text)",
        "share right",
    )
    keys = [f"layers/grad_norm_{layer:02d}" for layer in range(context.profile.model.num_layers)]
    norms = {f"layer {i}": context.series(key) for i, key in enumerate(keys)}
    by_layer = folder / "gradient_norm_by_layer.png"
    figures.curve(by_layer, norms, "context-extension: gradient norm by layer", "step", "norm", log=True)
    return [folder / "loss_by_position.png", folder / "retrieval_by_depth.png", by_layer]
