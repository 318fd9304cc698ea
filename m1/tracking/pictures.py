"""The report's own figures: the flow as a picture, and curves that span stages. Drawn from run folders."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from m1 import figures
from m1.run import registry
from m1.run.contract import StageResult
from m1.run.folder import MetricsLine
from m1.run.stage import Kind

Series = dict[str, tuple[list[float], list[float]]]
_KINDS = {"data": "#E8F1F8", "training": "#FDEBDD", "reinforcement learning": "#E2F3EC", "check and export": "#F0F0F0"}
_EDGES = {"data": "#0072B2", "training": "#D55E00", "reinforcement learning": "#009E73", "check and export": "#6B6B6B"}
_COLUMNS = 4


def kind_of(stage: str) -> str:
    """What sort of work a stage does, a key of the picture's legend."""
    return registry.stage(stage).kind.value


def flow_picture(path: Path, order: Sequence[str], results: Mapping[str, StageResult], done: Sequence[str]) -> Path:
    """Boxes in the order of the run, each with its time and key metric; stages not in `done` are pale and dashed."""
    from matplotlib.patches import FancyBboxPatch, Patch

    rows = math.ceil(len(order) / _COLUMNS)
    with figures.canvas(path, 10.0, 1.35 * rows + 0.5) as (_, axes):
        axes.set_axis_off()
        axes.set_xlim(-0.5, _COLUMNS - 0.5)
        axes.set_ylim(-rows + 0.45, 0.6)
        for number, stage in enumerate(order):
            x, y = _place(number)
            kind, here = kind_of(stage), stage in done
            box = FancyBboxPatch(
                (x - 0.4, y - 0.33), 0.8, 0.66, boxstyle="round,pad=0.0,rounding_size=0.06", facecolor=_KINDS[kind]
            )
            box.set(edgecolor=_EDGES[kind], linewidth=1.3, linestyle="-" if here else "--", alpha=1 if here else 0.45)
            axes.add_patch(box)
            axes.text(x, y + 0.17, f"{number + 1}  {stage}", ha="center", va="center", fontsize=10, weight="bold")
            axes.text(x, y - 0.11, _caption(stage, results.get(stage), here), ha="center", va="center", fontsize=8)
            if number + 1 < len(order):
                self_end, next_end = _arrow(number)
                arrow = {"arrowstyle": "-|>", "color": "#777777", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", next_end, self_end, arrowprops=arrow)
        present = [kind for kind in _KINDS if any(kind_of(stage) == kind for stage in order)]
        handles = [Patch(facecolor=_KINDS[kind], edgecolor=_EDGES[kind], label=kind) for kind in present]
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(present))
    return path


def _place(number: int) -> tuple[float, float]:
    """Centre of a box: rows are read in turn from the left and from the right, so that every arrow is short."""
    row, column = divmod(number, _COLUMNS)
    return (float(column if row % 2 == 0 else _COLUMNS - 1 - column), float(-row))


def _arrow(number: int) -> tuple[tuple[float, float], tuple[float, float]]:
    (x, y), (to_x, to_y) = _place(number), _place(number + 1)
    if to_y < y:
        return (x, y - 0.33), (to_x, to_y + 0.33)
    side = 0.4 if to_x > x else -0.4
    return (x + side, y), (to_x - side, to_y)


def _caption(stage: str, result: StageResult | None, here: bool) -> str:
    if not here:
        return "not done yet"
    if result is None:
        return "data set"
    metric = result.key_metric if len(result.key_metric) <= 28 else f"{result.key_metric[:27]}…"
    values = [f"{value:.4g}" for value in (result.before, result.after) if value is not None]
    return f"{duration(result.seconds)}\n{metric}\n{' → '.join(values) or '-'}"


def duration(seconds: float) -> str:
    """Seconds as people read them: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


#: Figures over stages: file name -> (title, value axis, logarithmic, stages, pattern of the metric's key).
_TRAINED = (Kind.TRAINING,)
_RL = (Kind.REINFORCEMENT,)
_SPANNING: dict[str, tuple[str, str, bool, tuple[Kind, ...], str]] = {
    "loss": ("Language-model loss, stage after stage", "loss (nats per token)", False, _TRAINED, r"(^|[/_])loss$"),
    "gradient-norm": (
        "Gradient norm, stage after stage",
        "global L2 norm",
        True,
        (*_TRAINED, *_RL),
        r"(^|/)(global_)?grad(ient)?_norm$",
    ),
    "reward": (
        "Reward in reinforcement learning",
        "mean reward",
        False,
        _RL,
        r"(^|/)(reward|reward(/|_)mean|mean_reward)$",
    ),
    "response-length": (
        "Response length in reinforcement learning",
        "tokens",
        False,
        _RL,
        r"response(_|/)len(gth)?((_|/)(mean|p99))?$",
    ),
}
_NOT_COMPARABLE = re.compile(r"aux|z_loss|layer|position|router|balance")


def spanning(folder: Path, order: Sequence[str], metrics: Mapping[str, Sequence[MetricsLine]]) -> dict[str, Path]:
    """Curves over several stages, on a common axis of steps. A figure for which no stage logged anything is left out.

    Args:
        metrics: stage -> lines of its metrics.jsonl (`m1.run.folder.read_metrics`).

    Returns:
        name -> image.
    """
    drawn = {}
    for name, (title, ylabel, log, kinds, pattern) in _SPANNING.items():
        series: Series = {}
        offset = 0.0
        for stage in (stage for stage in order if registry.stage(stage).kind in kinds):
            lines = metrics.get(stage, [])
            for line in lines:
                for key, value in line.metrics.items():
                    if re.search(pattern, key) and not _NOT_COMPARABLE.search(key):
                        steps, values = series.setdefault(f"{stage}: {key}", ([], []))
                        steps.append(offset + line.step)
                        values.append(value)
            offset += max((line.step for line in lines), default=-1.0) + 1
        if series:
            xlabel = f"step, {' then '.join(dict.fromkeys(label.split(':')[0] for label in series))}"
            drawn[name] = figures.curve(folder / f"{name}.png", series, title, xlabel, ylabel, log=log)
    return drawn


def accuracy(path: Path, metrics: Mapping[str, float], tasks: Sequence[str]) -> Path | None:
    """Accuracy by task before and after, from final metrics whose key holds a task's name; None where there are none.

    What remains of the key without the task names the bars: "sft/pass@1/arithmetic" belongs to "sft/pass@1".
    """
    groups: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        task = next((part for part in parts if part in tasks), None)
        if task is not None and re.search(r"pass|acc|solve", key):
            groups.setdefault("/".join(part for part in parts if part != task), {})[task] = value
    if not groups:
        return None
    shown = [task for task in tasks if any(task in values for values in groups.values())]
    bars = {name: [values.get(task, math.nan) for task in shown] for name, values in groups.items()}
    return figures.bars_by_group(path, shown, bars, "Held-out accuracy by task", "share of answers that are right")
