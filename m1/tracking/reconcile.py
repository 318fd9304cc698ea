"""MLflow brought to what the run folders say, after processes died that could not tell it themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from m1 import paths
from m1.errors import M1Error
from m1.run.contract import StageResult, load_result
from m1.tracking import experiment, flow_run
from m1.tracking.server import Server
from m1.tracking.stage_run import StageTracker

if TYPE_CHECKING:
    from mlflow.entities import Run


def finish_stages(server: Server, where: str) -> list[str]:
    """Finish the runs of stages whose work is complete, though their record is not: points, result, model, status.

    A flow that was killed between a stage's result and its record leaves such a run, as FAILED, KILLED or RUNNING.

    Returns:
        ids of the runs that were finished.
    """
    wanted = f"attributes.status != 'FINISHED' and tags.{experiment.LEVEL} = '{experiment.STAGE_LEVEL}'"
    finished = []
    for run in list(server.runs(where, wanted)):
        result = _result(run)
        if result is None:
            continue
        did = server.original_run(run.data.tags["profile"], result.fingerprint)
        if did is not None and did.info.run_id == run.info.run_id:  # no later run has done the rest of the work
            StageTracker(server, run, result.request.load_profile(), result.stage, result.request).catch_up(result)
            finished.append(run.info.run_id)
    return finished


def close_dead(server: Server, where: str, alive: Collection[str]) -> list[str]:
    """Close the flow runs that are RUNNING although no process serves them, and their stages.

    Args:
        alive: ids in Prefect of the flow runs that a process serves.

    Returns:
        names of the flow runs that were closed.
    """
    running = list(server.runs(where, "attributes.status = 'RUNNING'"))
    dead = [run for run in running if run.data.tags.get("prefect_run_id") not in alive]
    if not dead:
        return []
    finished = set(finish_stages(server, where))
    error = "its process is gone: it was killed, or the machine stopped"
    # A flow run tells of its stages' ends: they come first.
    for run in sorted(dead, key=lambda run: "stage" not in run.data.tags):
        if run.info.run_id not in finished:
            flow_run.close_stale(server, run, error)
    return [run.info.run_name for run in dead if "stage" not in run.data.tags]


def _result(run: Run) -> StageResult | None:
    """The result in the folder of a stage's run, if it is of this very work."""
    path = run.data.tags.get("path")
    try:
        result = load_result(paths.ROOT / path) if path else None
    except M1Error:
        return None
    return result if result is not None and result.fingerprint == run.data.tags.get("fingerprint") else None
