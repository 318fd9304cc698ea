"""The contract of a stage: what it is given, and what it leaves behind.

A data stage writes `data/<profile>/<stage>`; DVC records it. Every other stage writes a run folder
`runs/<profile>/<stage>/<fingerprint>` (`m1.run.folder`), which is complete if and only if it holds `result.json`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue

from m1.config.base import Section
from m1.config.profile import Profile
from m1.files import write_json
from m1.run import folder, outputs, profiles
from m1.run.outputs import OutputFile
from m1.run.registry import stage
from m1.run.stage import Origin

S = TypeVar("S", bound=Section)

#: A data stage's summary of its output, the same on every run of the same inputs. "notes" and "left_out" are as in
#: `StageResult`, "sources" names raw sources with version, hash and licence.
Summary = dict[str, JsonValue]


class Record(BaseModel):
    """Something that is stored as JSON in a run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Upstream(Record):
    """A run that a later one was made from, directly or not: its stage, and its run folder, absolute."""

    stage: str
    run: str

    @property
    def folder(self) -> Path:
        return Path(self.run)


class StageRequest(Record):
    """Everything one execution of a stage is given. It is written to `request.json` in the run folder.

    Attributes:
        profile: the resolved profile as plain values.
        fingerprint: 64 hex digits.
        output: run folder, absolute.
        data: data stage -> its folder, absolute.
        data_digests: data stage -> hash in dvc.lock.
        parent: run folder of the training stage it starts from, or None.
        parent_stage: name of that stage, or None.
        history: every training run upstream of this one, oldest first.
        resume: run folder of the same stage at another parallel layout, whose newest checkpoint is continued as long
            as this run has none of its own.
        origin: the base model that it starts from, or None.
        left_out: task families that the profile asks for and that this run does without: what they need is missing.
    """

    stage: str
    profile: dict[str, JsonValue]
    fingerprint: str
    output: str
    data: dict[str, str]
    data_digests: dict[str, str]
    parent: str | None = None
    parent_stage: str | None = None
    history: tuple[Upstream, ...] = ()
    resume: str | None = None
    origin: Origin | None = None
    left_out: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.output)

    def load_profile(self) -> Profile:
        return profiles.parse(self.profile, "request")


class StageResult(Record):
    """What a complete stage leaves behind, as `result.json` in its run folder.

    Attributes:
        checkpoint: folder of the final checkpoint relative to the run folder, or None.
        key_metric: name of the metric shown in the summary table.
        before, after: that metric before and after the stage; None where it has no such value.
        metrics: final scalar metrics.
        figures: image files relative to the run folder.
        notes: sentences for the report: what was unusual, what was skipped and why.
        left_out: of the notes, those on a part that could not be done, for example because no engine answers.
        seconds: wall time inside the stage's process, without its imports.
        finished_at: seconds since the epoch.
        number: of the runs of this stage and profile that are complete, the later has the higher one; the clock may
            have been set between two of them.
        files: what the run has left, for `fault_of`: of a training stage its checkpoint, of another one every file.
    """

    stage: str
    fingerprint: str
    request: StageRequest
    checkpoint: str | None
    key_metric: str
    before: float | None
    after: float | None
    metrics: dict[str, float]
    figures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    finished_at: float = 0.0
    number: int = 0
    files: dict[str, OutputFile] = {}


class StageContext(Generic[S]):
    """Handed to a stage's `run` function: its inputs, its output folder, its metrics log and its progress.

    Only rank 0 writes files; `log_metrics` and `progress` do nothing on other ranks.

    Attributes:
        section: the stage's own section of the profile.
        output: run folder.
        data: data stage -> its folder.
    """

    def __init__(self, request: StageRequest) -> None:
        self.request = request
        self.stage = request.stage
        self.profile = request.load_profile()
        self.section: S = self.profile.section(self.stage, stage(self.stage).section)  # type: ignore[assignment]
        self.output = request.run
        self.parent = Path(request.parent) if request.parent else None
        self.data = {name: Path(place) for name, place in request.data.items()}
        self.rank = int(os.environ.get("RANK", "0"))
        self._started = time.time()
        self._logged: set[tuple[int, tuple[str, ...]]] = set()
        if self.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)

    def parent_checkpoint(self) -> Path:
        """Folder of the parent's final checkpoint."""
        assert self.parent is not None
        return checkpoint_of(self.parent)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`; the flow forwards it to MLflow. Keys like "train/loss"."""
        if self.rank == 0 and folder.line_key(step, metrics) not in self._logged:
            values = {name: float(value) for name, value in metrics.items()}
            self._append({"step": int(step), "time": time.time(), "metrics": values})

    def continue_after(self, step: int) -> None:
        """The stage goes on from its checkpoint of this step: what was logged of later ones is taken back.

        What the step itself has logged stays, and is not written again.
        """
        if self.rank == 0:
            kept = folder.drop_metrics_after(self.output, step)
            self._logged = {folder.line_key(line.step, line.metrics) for line in kept}

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Report progress; `text` is a short remark such as the current loss."""
        if self.rank == 0:
            self._append({"time": time.time(), "progress": {"done": done, "total": total, "text": text}})

    def write_interruption(self, step: int, checkpoint: Path) -> None:
        """Record that the stage was stopped after `step`, and the checkpoint from which it will continue."""
        if self.rank == 0:
            place = str(checkpoint.relative_to(self.output))
            write_json(self.output / folder.INTERRUPTION, {"step": step, "checkpoint": place, "time": time.time()})

    def figures_dir(self) -> Path:
        made = self.output / "figures"
        made.mkdir(parents=True, exist_ok=True)
        return made

    def read_metrics(self) -> list[folder.MetricsLine]:
        """Every metrics line so far, for figures; a step logged twice (after a resume) keeps the later line."""
        return folder.read_metrics(self.output)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric so far."""
        return folder.series(self.read_metrics(), name)

    def _append(self, line: Mapping[str, object]) -> None:
        with open(self.output / folder.METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _left(self, checkpoint: Path | None) -> list[Path]:
        """Files to be recorded; those of training are in its checkpoint's own manifest, and cost no second hash."""
        if stage(self.stage).trains:
            return [] if checkpoint is None else [checkpoint]
        return [path for path in self.output.rglob("*") if path.name not in folder.OWN_FILES]

    def finish(
        self,
        *,
        checkpoint: Path | None,
        key_metric: str,
        before: float | None,
        after: float | None,
        metrics: Mapping[str, float],
        figures: Sequence[Path] = (),
        notes: Sequence[str] = (),
        left_out: Sequence[str] = (),
    ) -> StageResult:
        """Write `result.json`: from here on the run folder is complete."""
        result = StageResult(
            stage=self.stage,
            fingerprint=self.request.fingerprint,
            request=self.request,
            checkpoint=str(checkpoint.relative_to(self.output)) if checkpoint else None,
            key_metric=key_metric,
            before=None if before is None else float(before),
            after=None if after is None else float(after),
            metrics={name: float(value) for name, value in metrics.items()},
            figures=tuple(str(figure.relative_to(self.output)) for figure in figures),
            notes=tuple(notes),
            left_out=tuple(left_out),
            seconds=time.time() - self._started,
            finished_at=time.time(),
        )
        if self.rank == 0:  # it alone writes, and reads what others have left
            number = 1 + max((number for number, _, _ in _finished(self.profile.name, self.stage)), default=0)
            files = outputs.note(self.output, self._left(checkpoint))
            result = result.model_copy(update={"number": number, "files": files})
            folder.write_record(self.output / folder.RESULT, result)
        return result


def load_request(run: Path) -> StageRequest | None:
    """What a run folder was asked for, or None if that cannot be read."""
    return folder.read_record(run / folder.REQUEST, StageRequest)


def load_result(run: Path) -> StageResult | None:
    """The result of a run folder, or None if the run is not complete.

    Raises:
        UsageError: its `result.json` is damaged, or of an older form.
    """
    return folder.require_record(run / folder.RESULT, StageResult, f"Remove {run} and rerun the stage.")


def checkpoint_of(run: Path) -> Path:
    """Final checkpoint of a complete run folder.

    Raises:
        UsageError: it has none.
    """
    result = load_result(run)
    if result is None or result.checkpoint is None:
        raise folder.no_checkpoint(run)
    return run / result.checkpoint


def fault_of(result: StageResult) -> str | None:
    """What of the files that a complete run has left is gone or changed, in a few words; None if nothing is."""
    run = result.request.run
    if result.checkpoint is not None and not (run / result.checkpoint).is_dir():
        return f"{result.checkpoint} is gone"
    return outputs.fault_of(run, result.files)


def finished(request: StageRequest) -> StageResult | None:
    """The result of a request whose work is done and whose files are still there, or None: then it is to be done.

    Raises:
        UsageError: its `result.json` is damaged.
    """
    result = load_result(request.run)
    if result is None or result.fingerprint != request.fingerprint or fault_of(result) is not None:
        return None
    return result


def newest_run(profile_name: str, stage_name: str) -> Path | None:
    """Run folder of the stage that finished last, or None."""
    found = _finished(profile_name, stage_name)
    return max(found)[2] if found else None


def _finished(profile_name: str, stage_name: str) -> list[tuple[int, float, Path]]:
    """(number, time, run folder) of every complete run."""
    runs = folder.runs(profile_name, stage_name)
    results = [(run, result) for run in runs if (result := load_result(run)) is not None]
    return [(result.number, result.finished_at, run) for run, result in results]
