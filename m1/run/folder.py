"""The files of a run folder, `runs/<profile>/<stage>/<fingerprint>`: names, reading, writing."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from m1 import paths
from m1.config.reading import describe
from m1.errors import Checkpointed, UsageError
from m1.files import write_rows, write_text
from m1.rows import read_json

#: Written last: a run folder with it is complete.
RESULT = "result.json"
REQUEST = "request.json"
METRICS = "metrics.jsonl"
LOG = "log.txt"
#: Left by a stage that SIGTERM ended after a checkpoint; gone as soon as the stage is started again.
INTERRUPTION = "interrupted.json"
#: What the contract itself keeps in a run folder, beside what the stage leaves there.
OWN_FILES = (RESULT, REQUEST, METRICS, LOG, INTERRUPTION)

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class MetricsLine:
    """Metrics of one step, as a stage logged them."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: percent, and a short remark."""

    percent: float
    text: str


def runs(profile_name: str, stage: str) -> list[Path]:
    """Every run folder of a stage, complete or not."""
    return sorted(path for path in paths.runs_dir(profile_name, stage).glob("*") if path.is_dir())


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as JSON, atomically."""
    write_text(path, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path, kind: type[R]) -> R | None:
    """A record from its JSON, or None where there is none that can be read."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def require_record(path: Path, kind: type[R], hint: str) -> R | None:
    """A record from its JSON, or None where there is no file.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint) from error
    except ValidationError as error:
        raise UsageError(f"{path} is damaged ({describe(error, kind)})", hint) from error


def prepare(run: Path, request: BaseModel, *, force: bool = False) -> Path:
    """Make the run folder ready for a stage to start in; `force` discards what an earlier execution left there.

    Returns:
        the file with the request.
    """
    if force and run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / INTERRUPTION).unlink(missing_ok=True)
    (run / RESULT).unlink(missing_ok=True)  # of a run whose files are damaged
    write_record(run / REQUEST, request)
    return run / REQUEST


def read_metrics(run: Path) -> list[MetricsLine]:
    """Metrics lines of a run folder in order of step, the last of each (step, set of names)."""
    lines: dict[tuple[int, tuple[str, ...]], MetricsLine] = {}
    for content in _lines(run):
        if (line := _metrics_line(content)) is not None:
            lines[line_key(line.step, line.metrics)] = line
    return [lines[key] for key in sorted(lines)]


def _metrics_line(content: dict[str, Any]) -> MetricsLine | None:
    """None for a line of another kind, or one that no stage wrote."""
    step, metrics = content.get("step"), content.get("metrics")
    if type(step) is not int or not isinstance(metrics, dict):
        return None
    if not all(type(value) in (int, float) for value in metrics.values()):
        return None
    return MetricsLine(step, metrics)


def line_key(step: int, metrics: Mapping[str, float]) -> tuple[int, tuple[str, ...]]:
    """What tells two lines of metrics apart: the step, and the set of names."""
    return int(step), tuple(sorted(metrics))


def drop_metrics_after(run: Path, step: int) -> list[MetricsLine]:
    """Take back the metrics of later steps, and a line that a kill has cut; returns what is left."""
    lines = ((content, _metrics_line(content)) for content in _lines(run))
    kept = [(content, line) for content, line in lines if line is not None and line.step <= step]
    if (run / METRICS).is_file():
        write_rows(run / METRICS, [content for content, _ in kept])
    return [line for _, line in kept]


def series(lines: Sequence[MetricsLine], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric."""
    found = [(float(line.step), line.metrics[name]) for line in lines if name in line.metrics]
    return [step for step, _ in found], [value for _, value in found]


def read_progress(run: Path) -> Progress | None:
    """The last progress line of a run folder, None before there is one."""
    for content in reversed(_lines(run, last_bytes=20_000)):
        progress = content.get("progress")
        with contextlib.suppress(TypeError, KeyError, ValueError, OverflowError):  # a line that no stage wrote
            if progress is not None:
                percent = 100.0 * float(progress["done"]) / max(float(progress["total"]), 1e-9)
                return Progress(percent, str(progress["text"]))
    return None


def _lines(run: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """JSON objects of `metrics.jsonl`; a line cut by a kill or by `last_bytes`, or damaged by a disk, is left out."""
    path = run / METRICS
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, path.stat().st_size - last_bytes))
            texts = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    found = []
    for text in texts:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def read_interruption(run: Path, stage: str, since: float = 0.0) -> Checkpointed | None:
    """The error of an execution that SIGTERM ended after a checkpoint, at or after `since`; None if there is none."""
    try:
        left = read_json(run / INTERRUPTION)
        if float(left["time"]) < since:
            return None
        return Checkpointed.after(stage, int(left["step"]), run / str(left["checkpoint"]))
    except (UsageError, KeyError, TypeError, ValueError):  # none, or one that no stage wrote
        return None


def no_checkpoint(run: Path) -> UsageError:
    return UsageError(f"{run} holds no finished checkpoint", "Run the stage that makes it, or name another run.")
