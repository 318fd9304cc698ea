"""Figures of the stages and of the report, all in one style.

Every function draws to a file through its own Figure and the Agg canvas: no pyplot, no global state, safe on any rank
and thread. Values that are not finite leave a gap.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers (after Okabe and Ito), in order of use.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#8A5A00", "#4B0082", "#A6761D")
_GREY = "#6B6B6B"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


@contextlib.contextmanager
def canvas(path: Path, width: float = 7.2, height: float = 3.8) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one set of axes, written to `path` when the block ends; size in inches at 150 dots per inch."""
    with _sheet(path, width, height) as figure:
        yield figure, figure.add_subplot()


@contextlib.contextmanager
def pair(path: Path, width: float, height: float) -> Iterator[tuple[Figure, Axes, Axes]]:
    """The same with two sets of axes side by side."""
    with _sheet(path, width, height) as figure:
        left, right = figure.subplots(1, 2)
        yield figure, left, right


@contextlib.contextmanager
def _sheet(path: Path, width: float, height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(unfinished, format="png", dpi=150, facecolor="white")
        os.replace(unfinished, path)


def curve(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Path:
    """Lines over steps.

    Args:
        series: name -> (steps, values), of equal length.
        log: logarithmic value axis; values of 0 and below leave a gap.
    """
    with canvas(path) as (_, axes):
        _lines(axes, series, log)
        _label(axes, title, xlabel, ylabel, len(series))
    return path


def position_curve(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "Held-out loss by position in the sequence",
    xlabel: str = "position (tokens, logarithmic)",
    ylabel: str = "loss (nats per token)",
    trained_length: int | None = None,
) -> Path:
    """Held-out loss over the token's position.

    Args:
        series: name (such as "after 1024") -> (positions counted from 1, losses).
        trained_length: marked by a vertical line.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    with canvas(path) as (_, axes):
        _lines(axes, series, log=False)
        positions = [p for xs, _ in series.values() for p in xs if p > 0]
        if positions:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        if trained_length is not None:
            axes.axvline(trained_length, color=_GREY, linestyle="--", linewidth=1)
            label = f" trained length {trained_length}"
            at_top = axes.get_xaxis_transform()
            axes.text(trained_length, 0.98, label, transform=at_top, color=_GREY, fontsize=8, rotation=90, va="top")
        _label(axes, title, xlabel, ylabel, len(series))
    return path


def bars_by_group(
    path: Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str,
    limit: float | None = 1.0,
) -> Path:
    """Bars side by side within each group, such as accuracy by task before and after.

    Args:
        groups: names on the horizontal axis.
        series: name (such as "before RL") -> one value per group.
        limit: top of the value axis; None lets the data decide.
    """
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"series {name!r} has {len(values)} values for {len(groups)} groups")
    width = 0.8 / max(1, len(series))
    with canvas(path, min(12.0, max(7.2, 1.2 + 0.22 * len(groups) * (len(series) + 1))), 4.0) as (_, axes):
        for index, (name, values) in enumerate(series.items()):
            middle = [g - 0.4 + width * (index + 0.5) for g in range(len(groups))]
            heights = [value if math.isfinite(value) else 0.0 for value in values]
            axes.bar(middle, heights, width * 0.92, label=name, color=COLOURS[index % len(COLOURS)])
            if len(series) <= 3:
                for x, value in zip(middle, values, strict=True):
                    text = f"{value:.2f}".replace("0.", ".", 1) if math.isfinite(value) else "n/a"
                    height = value if math.isfinite(value) else 0.0
                    axes.annotate(text, (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xticks(range(len(groups)), [g.replace("_", " ") for g in groups], rotation=30, ha="right")
        axes.grid(axis="x", visible=False)
        if limit is not None:
            axes.set_ylim(0, limit * 1.04)
        _label(axes, title, "", ylabel, len(series), below=False)
    return path


def scatter(
    path: Path,
    x: Sequence[float],
    y: Sequence[float],
    title: str = "Rollout against training probabilities",
    xlabel: str = "probability by the rollout engine",
    ylabel: str = "probability by the training engine",
) -> Path:
    """Pairs of values that should agree, with the diagonal, their correlation and their differences.

    Args:
        x, y: values of equal length, one pair per token.
    """
    import numpy as np

    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ValueError(f"x and y must be of the same length, got {xs.shape} and {ys.shape}")
    finite = np.isfinite(xs) & np.isfinite(ys)
    left_out, xs, ys = int((~finite).sum()), xs[finite], ys[finite]
    with canvas(path, 5.2, 4.6) as (_, axes):
        if xs.size:
            low, high = float(min(xs.min(), ys.min())), float(max(xs.max(), ys.max()))
            axes.plot([low, high], [low, high], color=_GREY, linewidth=1, linestyle="--", zorder=1)
            alpha = float(np.clip(600 / xs.size, 0.05, 0.7))
            axes.scatter(xs, ys, s=9, alpha=alpha, color=COLOURS[0], linewidths=0, rasterized=True, zorder=2)
            difference = np.abs(xs - ys)
            facts = [f"{xs.size:,} pairs"]
            if xs.size > 1 and xs.std() > 0 and ys.std() > 0:
                facts.append(f"correlation {np.corrcoef(xs, ys)[0, 1]:.5f}")
            facts += [f"mean |difference| {difference.mean():.2g}", f"largest {difference.max():.2g}"]
            if left_out:
                facts.append(f"{left_out} pairs not finite")
            axes.text(0.03, 0.97, "\n".join(facts), transform=axes.transAxes, va="top", fontsize=9, color="#333333")
        else:
            _nothing(axes)
        _label(axes, title, xlabel, ylabel, 1)
    return path


def _lines(axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], log: bool) -> None:
    drawn = 0
    for index, (name, (steps, values)) in enumerate(series.items()):
        if len(steps) != len(values):
            raise ValueError(f"series {name!r} has {len(steps)} steps and {len(values)} values")
        usable = [v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in values]
        drawn += sum(math.isfinite(v) for v in usable)
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(usable) <= 30 else {}
        axes.plot(list(steps), usable, label=name, color=COLOURS[index % len(COLOURS)], **marker)
    if not drawn:
        _nothing(axes)
    elif log:
        axes.set_yscale("log")


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _label(axes: Axes, title: str, xlabel: str, ylabel: str, series: int, below: bool = True) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if series > 2 or (series > 1 and not below):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif series > 1:
        axes.legend(loc="best")


__all__ = ["COLOURS", "bars_by_group", "canvas", "curve", "pair", "position_curve", "scatter"]
