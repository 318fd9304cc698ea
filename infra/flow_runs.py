"""Flow runs of this checkout: which process serves which, what a run tells of itself, runs whose process is gone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from infra.process import ProcessRecord
from m1 import paths
from m1.files import read_lines
from m1.run.summary import StageRow

EventKind = Literal["planned", "started", "stage running", "stage killed", "stage ended", "failed", "finished"]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of the plan: what is done, and why."""

    stage: str
    action: str
    reason: str


@dataclass(frozen=True)
class Event:
    """What a flow run tells those who watch it from outside.

    Attributes:
        stage: that it is about: "started", "stage running", "stage killed", "stage ended".
        message: why it runs, was killed or failed.
        output: run folder, absolute, of a stage that runs.
        row: of "stage ended".
        plan, mlflow_url: of "planned".
        time: seconds since the epoch.
    """

    kind: EventKind
    stage: str = ""
    message: str = ""
    output: str = ""
    row: StageRow | None = None
    plan: tuple[PlannedStage, ...] = ()
    mlflow_url: str = ""
    time: float = 0.0


_EVENT = TypeAdapter(Event)
#: Beside the pid file of a flow run that died: others have recorded its end.
_CLOSED = "closed"


@dataclass(frozen=True)
class FlowRunRecord:
    """A flow run that was started here. `folder` holds its pid file and its events."""

    identity: str
    folder: Path
    process: ProcessRecord


def folder_of(flow_run_id: str) -> Path:
    return paths.STATE / "flow-runs" / flow_run_id


def register(flow_run_id: str) -> Path:
    """Called by the process that serves the flow run: leave a pid file. Returns the run's folder."""
    folder = folder_of(flow_run_id)
    ProcessRecord.of(os.getpid()).write(folder / "process.json")
    return folder


def recorded() -> Iterator[FlowRunRecord]:
    """Every flow run that has a pid file here, alive or not."""
    for path in sorted((paths.STATE / "flow-runs").glob("*/process.json")):
        record = ProcessRecord.read(path)
        if record is not None:
            yield FlowRunRecord(path.parent.name, path.parent, record)


def alive() -> set[str]:
    """Ids of the flow runs that a process of this checkout serves."""
    return {record.identity for record in recorded() if record.process.alive()}


def unclosed() -> list[Path]:
    """Folders of flow runs whose process died before it could tell of the end."""
    dead = [record.folder for record in recorded() if not record.process.alive()]
    ends = ("failed", "finished")
    found = [folder for folder in dead if not (folder / _CLOSED).exists()]
    return [folder for folder in found if not any(event.kind in ends for event in read_events(folder))]


def note_closed(folder: Path) -> None:
    """MLflow has been told that this flow run is over."""
    (folder / _CLOSED).touch()


def process_of(flow_run_id: str) -> ProcessRecord | None:
    return ProcessRecord.read(folder_of(flow_run_id) / "process.json")


def write_event(folder: Path, event: Event) -> None:
    """Append one line for those who watch the run from outside."""
    content = {key: value for key, value in asdict(event).items() if value not in ("", (), None)}
    with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**content, "time": time.time()}) + "\n")


def read_events(folder: Path) -> list[Event]:
    """Every event so far; a line that is being written is left for the next look."""
    try:
        lines = read_lines(folder / "events.jsonl")
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError:
            break
    return events


def reconcile(work_pool: str, *, worker_is_new: bool) -> list[tuple[str, str]]:
    """Mark flow runs as crashed that the server believes alive while no process serves them.

    Args:
        work_pool: whose runs are served here.
        worker_is_new: the worker was started just now, so that runs which an earlier worker had taken but not yet
            started will never start.

    Returns:
        (name of the flow run, what was done) for each.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Crashed

    suspects = ["RUNNING", "CANCELLING", *(["PENDING"] if worker_is_new else [])]
    message = "Its process is gone (killed, or the machine stopped). A new run continues from the last checkpoint."
    changed = []
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(state={"type": {"any_": suspects}}))  # type: ignore[arg-type]
        for run in runs:
            process = process_of(str(run.id))
            if run.work_pool_name != work_pool or (process is not None and process.alive()):
                continue
            if process is None and not worker_is_new:
                continue  # it may be starting at this moment
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
            changed.append((run.name, "marked as crashed, its process is gone"))
    return changed
