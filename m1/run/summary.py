"""What one stage did in a run of the flow: one record, written by the flow and read by everything that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import TypeAdapter

Status = Literal["ran", "skipped", "failed"]


@dataclass(frozen=True)
class StageRow:
    """A stage of a flow run.

    Attributes:
        reason: why it ran or was skipped, or how it failed.
        seconds: wall time the stage took in all, its processes' start included; 0 where it was skipped.
        inside_seconds: of these, what the stage measured itself.
        key_metric, before, after: as in `StageResult`.
        output: folder of its result, relative to the checkout.
        checkpoint: relative to that.
        left_out: parts of the stage that could not be done, one sentence each.
        mlflow_run: id of its MLflow run.
    """

    stage: str
    status: Status
    reason: str
    seconds: float = 0.0
    inside_seconds: float = 0.0
    key_metric: str | None = None
    before: float | None = None
    after: float | None = None
    output: str | None = None
    checkpoint: str | None = None
    left_out: tuple[str, ...] = ()
    mlflow_run: str | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, object]) -> StageRow:
        """The row that `to_json` made."""
        return _ROW.validate_python(dict(content))


_ROW = TypeAdapter(StageRow)
