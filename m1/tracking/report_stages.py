"""What the report knows of every stage: its newest run folder or its data set, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m1 import paths
from m1.config.profile import Profile
from m1.run import registry
from m1.run.contract import StageResult, load_result, newest_run
from m1.run.folder import MetricsLine, read_metrics
from m1.tracking import records

#: Metrics that say how many tokens a batch of rollouts or a checkpoint's answers added.
_ADDED_TOKENS = ("rl/tokens", "evaluate/tokens")
_COUNTED_TOKENS = "train/tokens_seen"


@dataclass(frozen=True)
class Run:
    """A finished run of a training, evaluation or export stage."""

    folder: Path
    result: StageResult
    lines: Sequence[MetricsLine]

    @property
    def parent(self) -> Path | None:
        parent = self.result.request.parent
        return Path(parent) if parent else None

    @property
    def parent_stage(self) -> str:
        return self.result.request.parent_stage or ""

    @property
    def digests(self) -> Mapping[str, str]:
        """data stage -> hash of the data set that was read."""
        return self.result.request.data_digests

    @property
    def tokens(self) -> float | None:
        """Tokens read: a running count of training, or what every batch of rollouts or checkpoint added."""
        counts = [line.metrics[_COUNTED_TOKENS] for line in self.lines if _COUNTED_TOKENS in line.metrics]
        if counts:
            return max(counts)
        added = [line.metrics[key] for line in self.lines for key in _ADDED_TOKENS if key in line.metrics]
        if added:
            return sum(added)
        final = self.result.metrics
        return final.get("tokens", next((value for key, value in final.items() if key.endswith("/tokens")), None))


@dataclass(frozen=True)
class Data:
    """A data set and its summary."""

    record: records.DataRecord
    numbers: Mapping[str, float]
    notes: Sequence[str]
    left_out: Sequence[str]

    @property
    def tokens(self) -> float | None:
        parts = [self.numbers[key] for key in ("train/tokens", "heldout/tokens") if key in self.numbers]
        return sum(parts) if parts else self.numbers.get("tokens")


@dataclass(frozen=True)
class Stage:
    """One stage of the profile; neither `run` nor `data` where nothing was done yet."""

    number: int
    name: str
    run: Run | None = None
    data: Data | None = None

    @property
    def done(self) -> bool:
        return self.run is not None or self.data is not None

    @property
    def tokens(self) -> float | None:
        if self.run is not None:
            return self.run.tokens
        return self.data.tokens if self.data is not None else None

    @property
    def left_out(self) -> list[str]:
        """Parts of the stage that could not be done, one sentence each."""
        if self.run is not None:
            return list(self.run.result.left_out)
        return list(self.data.left_out) if self.data is not None else []


def load(settings: Profile) -> list[Stage]:
    """Every stage of the profile, in its order."""
    return [_load(settings.name, number, name) for number, name in enumerate(settings.order, 1)]


def _load(profile_name: str, number: int, name: str) -> Stage:
    if registry.stage(name).makes_data:
        record = records.locked(name, profile_name)
        return Stage(number, name, data=_data(record) if record is not None else None)
    folder = newest_run(profile_name, name)
    result = load_result(folder) if folder is not None else None
    if folder is None or result is None:
        return Stage(number, name)
    return Stage(number, name, run=Run(folder, result, read_metrics(folder)))


def _data(record: records.DataRecord) -> Data:
    summary = records.summary(paths.ROOT / record.path)
    # The sources have a table of their own.
    numbers = records.numbers({key: value for key, value in summary.items() if key != "sources"})
    left_out = [str(sentence) for sentence in summary.get("left_out", [])]
    return Data(record, numbers, [str(note) for note in summary.get("notes", [])], left_out)


__all__ = ["Data", "Run", "Stage", "load"]
