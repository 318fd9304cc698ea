"""The report's own figures: curves that span stages, drawn from run folders, and images as the page holds them."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m1 import figures
from m1.run import registry
from m1.run.folder import MetricsLine
from m1.run.stage import Kind
from m1.tracking.report_page import Figure


@dataclass(frozen=True)
class _Spanning:
    """A figure over stages.

    Attributes:
        key: pattern of the metrics it shows.
    """

    title: str
    ylabel: str
    kinds: tuple[Kind, ...]
    key: str
    log: bool = False


_TRAINED, _RL = (Kind.TRAINING,), (Kind.REINFORCEMENT,)
#: By the name of the file.
_SPANNING = {
    "loss": _Spanning(
        "Language-model loss, stage after stage",
        "loss (nats per token)",
        _TRAINED,
        r"(^|[/_])loss$",
    ),
    "gradient-norm": _Spanning(
        "Gradient norm, stage after stage",
        "global L2 norm",
        (*_TRAINED, *_RL),
        r"(^|/)(global_)?grad(ient)?_norm$",
        log=True,
    ),
    "reward": _Spanning(
        "Reward in reinforcement learning", "mean reward", _RL, r"(^|/)(reward|reward(/|_)mean|mean_reward)$"
    ),
    "response-length": _Spanning(
        "Response length in reinforcement learning", "tokens", _RL, r"response(_|/)len(gth)?((_|/)(mean|p99))?$"
    ),
}
_NOT_COMPARABLE = re.compile(r"aux|z_loss|layer|position|router|balance")
#: What a metric is called in a figure, by the pattern of its key; in the order in which a figure draws them.
_NAMES = {
    r"(^|/)(grad_norm|reward)$": "",
    r"^train/": "training",
    r"^heldout/": "held-out",
    r"response_length$": "mean",
    r"response_length_p99$": "99th percentile",
}


def spanning(folder: Path, metrics: Mapping[str, Sequence[MetricsLine]]) -> list[Path]:
    """Curves over several stages, a panel for each. A figure for which no stage logged anything is left out.

    Args:
        metrics: stage, in the order of the run -> lines of its metrics.
    """
    drawn = []
    for name, figure in _SPANNING.items():
        chosen = {name: lines for name, lines in metrics.items() if registry.stage(name).kind in figure.kinds}
        found = {stage: _matching(lines, figure.key) for stage, lines in chosen.items()}
        panels = {stage: series for stage, series in found.items() if series}
        if panels:
            file = folder / f"{name}.png"
            drawn.append(figures.panels(file, panels, figure.title, "step", figure.ylabel, log=figure.log))
    return drawn


def _matching(lines: Sequence[MetricsLine], pattern: str) -> dict[str, tuple[list[float], list[float]]]:
    """The metrics of one stage whose keys match, under the names that a figure gives them."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for key, value in line.metrics.items():
            if re.search(pattern, key) and not _NOT_COMPARABLE.search(key):
                steps, values = found.setdefault(key, ([], []))
                steps.append(line.step)
                values.append(value)
    names = {key: next((name for part, name in _NAMES.items() if re.search(part, key)), key) for key in found}
    if len(set(names.values())) < len(names):  # two metrics of one name would become one line
        return found
    order = list(_NAMES.values())
    ranked = sorted(found, key=lambda key: order.index(names[key]) if names[key] in order else len(order))
    return {names[key]: found[key] for key in ranked}


def embedded(path: Path, owner: str = "") -> Figure | None:
    """An image as the page holds it, or None where there is none that can be read.

    Args:
        owner: stage that drew it, named in its description.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(path) as image:
            (width, height), kind = image.size, Image.MIME.get(image.format or "", "image/png")
            said = str(image.info.get("Description", "")) or path.stem.replace("_", " ").replace("-", " ")
    except OSError:
        return None
    # A few pixels more than one column: a figure drawn for the whole page.
    wide = width > 1.1 * figures.HALF * figures.DOTS_PER_INCH
    description = said if not owner or said.startswith(owner) else f"{owner}: {said}"
    return Figure(f"data:{kind};base64,{base64.b64encode(content).decode()}", description, width, height, wide)


__all__ = ["embedded", "spanning"]
