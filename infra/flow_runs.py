"""Flow runs of this checkout: which process serves which run, and what to do with runs whose process is gone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.process import ProcessRecord
from m1 import paths


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


def process_of(flow_run_id: str) -> ProcessRecord | None:
    return ProcessRecord.read(folder_of(flow_run_id) / "process.json")


def write_event(folder: Path, event: dict[str, Any]) -> None:
    """Append one line for those who watch the run from outside."""
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": time.time(), **event}) + "\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_progress(run: Path) -> tuple[float, str] | None:
    """Percent and remark of the last progress line in a stage's run folder, None before there is one."""
    metrics = run / "metrics.jsonl"
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, metrics.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if '"progress"' in line and line.endswith("}}"):
            try:
                progress = json.loads(line)["progress"]
            except ValueError:  # the first line may be cut
                continue
            return 100.0 * progress["done"] / max(progress["total"], 1e-9), progress["text"]
    return None


def reconcile(*, worker_is_new: bool) -> list[tuple[str, str]]:
    """Mark flow runs as crashed that the server believes alive while no process serves them.

    Args:
        worker_is_new: the worker was started just now, so that runs which an earlier worker had taken but not yet
            started will never start.

    Returns:
        (name of the flow run, what was done) for each.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Crashed

    from infra.services import WORK_POOL

    suspects = ["RUNNING", "CANCELLING", *(["PENDING"] if worker_is_new else [])]
    message = "Its process is gone (killed, or the machine stopped). A new run continues from the last checkpoint."
    changed = []
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(state={"type": {"any_": suspects}}))  # type: ignore[arg-type]
        for run in runs:
            process = process_of(str(run.id))
            if run.work_pool_name != WORK_POOL or (process is not None and process.alive()):
                continue
            if process is None and not worker_is_new:
                continue  # it may be starting at this moment
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
            changed.append((run.name, "marked as crashed, its process is gone"))
    return changed
