"""Figures of the stages and of the report, all in one style.

Every function draws to a file through its own Figure and the Agg canvas: no pyplot, no global state, safe on any rank
and thread. Values that are not finite leave a gap. What a figure shows is also in its file as words (PNG text
"Description"), which the report uses as alternative text.

Sizes are those of the report's page: at its default width a column is as wide as `HALF`, the page as `WIDE`, and text
of `SMALLEST_TEXT` is then 13 CSS pixels high.
"""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

#: Colours that stay apart for colour-blind readers (after Okabe and Ito), in order of use.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#8A5A00", "#4B0082", "#A6761D")
#: Widths of a figure in inches: one of two columns, and the whole page.
HALF, WIDE = 5.6, 11.5
#: Of the files.
DOTS_PER_INCH = 150
#: Points. No text of a figure is smaller.
SMALLEST_TEXT = 11.5
_HEIGHT = 3.5
_GREY = "#6B6B6B"
_INK = "#24292F"
#: Inches that a character of `SMALLEST_TEXT` takes on average, a legend's entry beside its text, a row of entries.
_CHARACTER, _HANDLE, _LEGEND_ROW = 0.088, 0.6, 0.24
_STYLE: Any = {
    "font.size": SMALLEST_TEXT,
    "text.color": _INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlecolor": _INK,
    "axes.labelcolor": "#444C56",
    "axes.edgecolor": "#A0A7AF",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E9ECEF",
    "grid.linewidth": 0.8,
    "xtick.color": "#A0A7AF",
    "ytick.color": "#A0A7AF",
    "xtick.labelcolor": "#444C56",
    "ytick.labelcolor": "#444C56",
    "legend.frameon": False,
    "legend.fontsize": SMALLEST_TEXT,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
}


@contextlib.contextmanager
def canvas(path: Path, width: float = HALF, height: float = _HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one set of axes, written to `path` when the block ends; size in inches.

    The figure's label (`Figure.set_label`) becomes the description in the file.
    """
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
        described = {"Description": label} if (label := str(figure.get_label())) else {}
        figure.savefig(unfinished, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata=described)
        os.replace(unfinished, path)


def curve(path: Path, series: Series, title: str, xlabel: str, ylabel: str, log: bool = False) -> Path:
    """Lines over steps.

    Args:
        series: name -> (steps, values), of equal length.
        log: logarithmic value axis; values of 0 and below leave a gap.
    """
    with canvas(path) as (figure, axes):
        _lines(axes, series, log)
        if {value for _, values in series.values() for value in values} == {0.0}:
            axes.set_ylim(
                -0.03, 1
            )  # around nothing but zeros the axis would be symmetric, as if they could be negative
        _label(axes, title, xlabel, ylabel)
        _legend(figure, list(series))
        figure.set_label(_in_words(title, series))
    return path


def panels(path: Path, groups: Mapping[str, Series], title: str, xlabel: str, ylabel: str, log: bool = False) -> Path:
    """Lines in panels side by side on a common value axis, such as one panel for each stage with its own steps.

    Args:
        groups: title of a panel -> its series, as in `curve`; a name has the same colour in every panel.
        log: as in `curve`.
    """
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    with _sheet(path, HALF if len(groups) <= 2 else WIDE, _HEIGHT) as figure:
        grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (panel, series) in zip(grid, groups.items(), strict=True):
            _lines(axes, series, log, names)
            _label(axes, panel, xlabel, ylabel if axes is grid[0] else "")
            axes.set_title(panel, fontsize=SMALLEST_TEXT, pad=6)
        # The title stands above the whole figure, at its left edge as in the other figures.
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        _legend(figure, names)
        figure.set_label(" ".join([f"{title}.", *(_in_words(panel, series) for panel, series in groups.items())]))
    return path


def position_curve(
    path: Path,
    series: Series,
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

    with canvas(path) as (figure, axes):
        _lines(axes, series, log=False)
        positions = [p for xs, _ in series.values() for p in xs if p > 0]
        if positions:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        if trained_length is not None:
            axes.axvline(trained_length, color=_GREY, linestyle="--", linewidth=1)
            said: Any = {"color": _GREY, "rotation": 90, "va": "top", "transform": axes.get_xaxis_transform()}
            said["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # lines may run below it
            axes.text(trained_length, 0.98, f" trained length {trained_length}", **said)
        _label(axes, title, xlabel, ylabel)
        _legend(figure, list(series))
        figure.set_label(_in_words(title, series))
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
    wide = WIDE if len(groups) > 4 else HALF
    room = (wide - 0.8) / max(1, len(groups))  # inches of a group
    width = 0.8 / max(1, len(series))
    numbered = width * room > 0.34  # a value is as wide
    with canvas(path, wide) as (figure, axes):
        for index, (name, values) in enumerate(series.items()):
            middle = [g - 0.4 + width * (index + 0.5) for g in range(len(groups))]
            heights = [value if math.isfinite(value) else 0.0 for value in values]
            axes.bar(middle, heights, width * 0.9, label=name, color=COLOURS[index % len(COLOURS)])
            for x, height, value in zip(middle, heights, values, strict=True):
                if numbered:
                    text = f"{value:.2f}".replace("0.", ".", 1) if math.isfinite(value) else "n/a"
                    axes.annotate(text, (x, height), (0, 2), textcoords="offset points", ha="center")
        _name_groups(axes, groups, room)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.55, max(1, len(groups)) - 0.45)
        if limit is not None:
            axes.set_ylim(0, limit * (1.1 if numbered else 1.04))
        _label(axes, title, "", ylabel)
        _legend(figure, list(series))
        figure.set_label(" ".join([f"{title}.", *(_bars_in_words(name, groups, v) for name, v in series.items())]))
    return path


def _name_groups(axes: Axes, groups: Sequence[str], room: float) -> None:
    """Names below their bars on as many lines as they need; turned where a word is wider than its bars."""
    words = [group.replace("_", " ") for group in groups]
    fits = max(1, int((room - 0.08) / _CHARACTER))
    if all(len(part) <= fits for word in words for part in word.split()):
        axes.set_xticks(range(len(groups)), [textwrap.fill(word, fits, break_on_hyphens=False) for word in words])
    else:
        turn = 35 if room > 0.45 else 90
        axes.set_xticks(range(len(groups)), words, rotation=turn, ha="right", va="center", rotation_mode="anchor")


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
    facts = [f"{xs.size:,} pairs"]
    with canvas(path, HALF, 4.4) as (figure, axes):
        if xs.size:
            low, high = float(min(xs.min(), ys.min())), float(max(xs.max(), ys.max()))
            axes.plot([low, high], [low, high], color=_GREY, linewidth=1, linestyle="--", zorder=1)
            alpha = float(np.clip(600 / xs.size, 0.05, 0.7))
            axes.scatter(xs, ys, s=12, alpha=alpha, color=COLOURS[0], linewidths=0, rasterized=True, zorder=2)
            difference = np.abs(xs - ys)
            if xs.size > 1 and xs.std() > 0 and ys.std() > 0:
                facts.append(f"correlation {np.corrcoef(xs, ys)[0, 1]:.5f}")
            facts += [f"mean |difference| {difference.mean():.2g}", f"largest {difference.max():.2g}"]
            if left_out:
                facts.append(f"{left_out} pairs not finite")
            axes.text(0.03, 0.97, "\n".join(facts), transform=axes.transAxes, va="top")
        else:
            _nothing(axes)
        _label(axes, title, xlabel, ylabel)
        figure.set_label(f"{title}. {', '.join(facts)}.")
    return path


# --- parts of a figure ----------------------------------------------------------------------------------------------


def _lines(axes: Axes, series: Series, log: bool, names: Sequence[str] | None = None) -> None:
    """Draw `series`; `names` are those of all panels of the figure and decide the colours."""
    from matplotlib.ticker import MaxNLocator

    every = list(names or series)
    values: list[float] = []
    for name, (steps, measured) in series.items():
        if len(steps) != len(measured):
            raise ValueError(f"series {name!r} has {len(steps)} steps and {len(measured)} values")
        usable = [v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in measured]
        values += [v for v in usable if math.isfinite(v)]
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(usable) <= 30 else {}
        axes.plot(list(steps), usable, label=name, color=_colour(every.index(name), len(every)), **marker)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    if len(at := {step for steps, _ in series.values() for step in steps}) == 1:
        axes.set_xlim(min(at) - 1, max(at) + 1)  # by itself the axis would show hundredths of a step
    if not values:
        _nothing(axes)
    elif log:
        _logarithmic(axes, min(values), max(values))


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    """Powers of ten on the value axis; within little more than one of them round numbers, of which it shows several."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]) if high / low < 20 else LogLocator(10, numticks=6)
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axes.yaxis.set_minor_locator(NullLocator())


def _colour(index: int, count: int) -> Any:
    """Apart for few series; for many, such as one for each layer, from dark to light in their order."""
    if count <= len(COLOURS):
        return COLOURS[index]
    import matplotlib

    return matplotlib.colormaps["viridis"](0.95 * index / (count - 1))


def _nothing(axes: Axes) -> None:
    """Words in place of a scale that would mean nothing."""
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(visible=False)
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Names of several series below the figure, which grows by what they take."""
    if len(names) < 2:
        return
    shown = list(names)
    if len(shown) > len(COLOURS):  # in their order, so that a few tell the rest
        shown = [shown[round(i * (len(shown) - 1) / 5)] for i in range(6)]
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    shown = [name for name in shown if name in found]
    columns = _columns(shown, figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * math.ceil(len(shown) / columns))
    by_row = [name for column in range(columns) for name in shown[column::columns]]  # matplotlib fills columns first
    figure.legend([found[name] for name in by_row], by_row, loc="outside lower left", ncols=columns)


def _columns(names: Sequence[str], width: float) -> int:
    """As many columns of a legend as fit into `width` inches."""
    for columns in range(len(names), 1, -1):
        if sum(_HANDLE + _CHARACTER * max(map(len, names[c::columns])) for c in range(columns)) < width:
            return columns
    return 1


def _in_words(title: str, series: Series) -> str:
    """The title, and how far every line goes; of many lines the first and the last."""
    names = list(series)
    kept = names if len(names) <= 6 else [names[0], names[-1]]
    said = []
    for name in kept:
        finite = [value for value in series[name][1] if math.isfinite(value)]
        span = f"from {finite[0]:.4g} to {finite[-1]:.4g}" if finite else "no finite values"
        said.append(f"{name}: {span}" if name else span)
    return f"{title}. {'; '.join(said)}." if said else f"{title}."


def _bars_in_words(name: str, groups: Sequence[str], values: Sequence[float]) -> str:
    """Every value, or of many their span."""
    finite = [value for value in values if math.isfinite(value)]
    if len(groups) > 6 and finite:
        return f"{name}: {min(finite):.3g} to {max(finite):.3g} in {len(finite)} groups."
    return f"{name}: {', '.join(f'{group} {value:.3g}' for group, value in zip(groups, values, strict=True))}."


__all__ = [
    "COLOURS",
    "DOTS_PER_INCH",
    "HALF",
    "SMALLEST_TEXT",
    "WIDE",
    "Series",
    "bars_by_group",
    "canvas",
    "curve",
    "pair",
    "panels",
    "position_curve",
    "scatter",
]
