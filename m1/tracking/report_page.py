"""What the report's template is given: every text and number of the page, ready to be shown and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """A number as it is shown, and as it was logged."""

    shown: str
    exact: float


@dataclass(frozen=True)
class Entry:
    """A line of the contents: `kind` is empty for what is no stage."""

    anchor: str
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Fact:
    """A word and its meaning, or a name and what is known of it."""

    name: str
    text: str


@dataclass(frozen=True)
class LeftOut:
    """What could not be done, and in which stages."""

    sentence: str
    stages: list[str]


@dataclass(frozen=True)
class Metric:
    name: str
    value: Value


@dataclass(frozen=True)
class Change:
    """A stage's key metric."""

    metric: str
    before: Value | None
    after: Value | None


@dataclass(frozen=True)
class Figure:
    """An image as a data URI; `wide` if it takes both columns."""

    source: str
    description: str
    width: int
    height: int
    wide: bool


@dataclass(frozen=True)
class Cell:
    text: str
    numeric: bool = False


@dataclass(frozen=True)
class Sources:
    """Raw sources of a data set.

    Attributes:
        columns: names of what is known of them; `numeric` where every value is a number.
        licences: all that occur.
    """

    columns: list[Cell]
    rows: list[list[Cell]]
    licences: list[str]


@dataclass(frozen=True)
class StageView:
    """A stage wherever it is shown.

    Attributes:
        anchor: of its section, or "" if it has none because nothing was done.
        inputs: what it starts from: the parent's checkpoint, then data sets.
        time: "" for data sets, whose time nobody records.
        digest: of a data set, shortened.
        partial: whether a part of it was left out.
    """

    number: int
    name: str
    kind: str
    about: str
    anchor: str
    inputs: list[str]
    time: str
    change: Change | None
    digest: str
    tokens: Value | None
    partial: bool


@dataclass(frozen=True)
class PlanRow:
    """Plan and actual of one stage; None where nothing was planned or logged."""

    stage: str
    steps_planned: Value | None
    last_step: Value | None
    tokens_planned: Value | None
    bound: bool
    tokens: Value | None
    share: Value | None
    flops_planned: Value | None
    flops: Value | None
    time: str
    speed: Value | None


@dataclass(frozen=True)
class Shade:
    """An accuracy and how dark its cell is, from 0 to 10."""

    value: Value
    level: int


@dataclass(frozen=True)
class AccuracyRow:
    task: str
    cells: list[Shade | None]


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy: a column for every checkpoint, a row for every task."""

    checkpoints: list[str]
    rows: list[AccuracyRow]


@dataclass(frozen=True)
class StageSection:
    """What is told of one stage alone.

    Attributes:
        facts: where it came from: run folder, fingerprint, parent, hashes.
        left_out: sentences on parts that could not be done.
        notes: the other sentences.
        missing: names of figures that the run folder should hold and that cannot be read.
    """

    view: StageView
    facts: list[Fact]
    left_out: list[str]
    notes: list[str]
    figures: list[Figure]
    missing: list[str]
    sources: Sources | None
    metrics_title: str
    metrics: list[Metric]


@dataclass(frozen=True)
class Page:
    """The whole page, in its order."""

    profile: str
    facts: list[Fact]
    introduction: str
    left_out: list[LeftOut]
    mixed: list[str]
    kinds: list[str]
    stages: list[StageView]
    plan: list[PlanRow]
    curves: list[Figure]
    accuracy: Accuracy | None
    sections: list[StageSection]
    glossary: list[Fact]
    contents: list[Entry]


__all__ = [
    "Accuracy",
    "AccuracyRow",
    "Cell",
    "Change",
    "Entry",
    "Fact",
    "Figure",
    "LeftOut",
    "Metric",
    "Page",
    "PlanRow",
    "Shade",
    "Sources",
    "StageSection",
    "StageView",
    "Value",
]
