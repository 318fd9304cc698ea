"""The one flow: every stage in the profile's order, unchanged ones skipped.

The flow decides what runs when; a stage's own process does the work and knows nothing of Prefect. Stage tasks are
called directly, never submitted to a thread: a signal to the flow run (cancelling, `m1 down`) is an exception in the
main thread, and that is what stops the stage's processes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import plan as planning
from infra import dvc, flow_runs, launch, services
from m1 import paths
from m1.errors import Checkpointed, Interrupted, M1Error, ServiceError
from m1.profile import DATA_STAGES, TRAINING_STAGES, Profile
from m1.stage import StageRequest, StageResult, load_result, resolve
from m1.tracking import Tracker, records

#: Seconds without an answer after which a server counts as gone when its process is gone, too.
_DEAD_PATIENCE = 5.0
_PROGRESS_SECONDS = 5.0
#: How a stage ends that a signal stopped.
_BY_SIGNAL = (launch.StageKilled, Checkpointed)


@dataclass
class Run:
    """What the stages of one flow run share."""

    settings: Profile
    force: bool
    upstream: Path | None
    tracker: Tracker
    mlflow_run: str
    folder: Path
    plan: dict[str, planning.Row]
    data_changed: bool = False
    runs: dict[str, Path] = field(default_factory=dict)
    summary: list[Any] = field(default_factory=list)

    def event(self, **values: Any) -> None:
        flow_runs.write_event(self.folder, values)


@flow(name="m1", flow_run_name="{profile}", validate_parameters=True, persist_result=False)
def pipeline(
    profile: str = "tiny",
    start: str | None = None,
    stop: str | None = None,
    only: list[str] | None = None,
    upstream: str | None = None,
    force: bool = False,
    seed: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> Any:
    """Run a section of the recipe.

    Args:
        profile: name of a file in profiles/.
        start: first stage; default the first of the order.
        stop: last stage; default the last of the order.
        only: exactly these stages.
        upstream: what the first selected stage starts from: a run folder, the first digits of a fingerprint, an MLflow
            run id, or model@alias. Default: the newest finished run of the stage before it.
        force: do the work again although it is complete.
        seed: in place of the profile's.
        overrides: profile fields and their values, for example {"pretrain.train_steps": 10}.
    """
    flow_run_id = str(runtime.flow_run.id)
    folder = flow_runs.register(flow_run_id)
    try:
        run = _prepare(folder, flow_run_id, profile, start, stop, only, upstream, force, seed, overrides)
    except M1Error as error:
        flow_runs.write_event(folder, {"event": "failed", "message": str(error)})
        get_run_logger().error(str(error))
        return Failed(message=str(error))
    try:
        failure = _run_stages(run)
    except BaseException:  # cancelled, or stopped with the services
        _close(run, "KILLED")
        raise
    unrecorded = _close(run, "FAILED" if failure else "FINISHED")
    if message := failure or unrecorded:
        run.event(event="failed", message=message)
        return Failed(message=message)
    create_table_artifact(key="summary", table=run.summary, description="What each stage did")
    run.event(event="finished")
    ran = sum(row["status"] == "ran" for row in run.summary)
    return Completed(message=f"{len(run.summary)} stages, {ran} of them ran, the others were up to date")


def _run_stages(run: Run) -> str | None:
    """Every stage of the plan in order, up to the first that fails; returns what failed."""
    for stage in run.plan:
        state = _stage_task(stage, run.settings)(run, stage, return_state=True)
        if not state.is_completed():
            return state.message or f"stage {stage} ended in state {state.name}"
    return None


def _close(run: Run, outcome: str) -> str | None:
    """Close the MLflow run; returns what went wrong. A dead server must not hide the cause of a failure."""
    try:
        run.tracker.finish_flow_run(run.mlflow_run, outcome, run.summary)
    except M1Error as error:
        return str(error)
    return None


def _prepare(
    folder: Path,
    flow_run_id: str,
    profile: str,
    start: str | None,
    stop: str | None,
    only: list[str] | None,
    upstream: str | None,
    force: bool,
    seed: int | None,
    overrides: dict[str, Any] | None,
) -> Run:
    """Check everything that can be checked before work starts."""
    settings = planning.load_profile(profile, seed=seed, overrides=overrides)
    stages = planning.select(settings, start, stop, only)
    services.check_disk()
    uri = _mlflow_address()
    if not uri:
        raise ServiceError("no MLflow server is running", "Start it with `m1 up`.")
    tracker = Tracker.connect(uri)
    parent = None
    if upstream is not None:
        planning.check_upstream(settings, stages)
        parent = planning.find_upstream(upstream, settings) or tracker.find_run(upstream, settings)
    if any(stage in DATA_STAGES for stage in stages) and dvc.ensure_profile(settings.name):
        get_run_logger().info("params.yaml: added profile %s, so that dvc.yaml has its data stages", settings.name)
    rows = planning.plan(settings, start=start, stop=stop, only=only, upstream=parent, force=force)
    table = [{"stage": row.stage, "action": row.action, "reason": row.reason} for row in rows]
    create_table_artifact(key="plan", table=table, description=f"What the run will do, profile {settings.name}")
    mlflow_run = tracker.start_flow_run(settings, flow_run_id, services.flow_run_url(flow_run_id))
    url = tracker.url(tracker.client.get_run(mlflow_run))
    flow_runs.write_event(folder, {"event": "planned", "plan": table, "mlflow_url": url})
    return Run(settings, force, parent, tracker, mlflow_run, folder, {row.stage: row for row in rows})


def _mlflow_address() -> str:
    """Where MLflow is now; the worker's environment may be older than the server."""
    return services.mlflow_url() or os.environ.get("MLFLOW_TRACKING_URI", "")


# --- one stage ------------------------------------------------------------------------------------------------------


def _stage_task(stage: str, settings: Profile) -> Any:
    retries = settings.flow.retries
    return _run_one.with_options(
        name=stage,
        task_run_name=stage,
        retries=retries,
        retry_delay_seconds=settings.flow.retry_delay_seconds,
        retry_condition_fn=_was_killed,
    )


def _was_killed(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Only a stage that a signal ended is worth another try: any other failure would happen again."""
    return isinstance(state.result(raise_on_failure=False), _BY_SIGNAL)


@task(persist_result=False, cache_policy=NO_CACHE)
def _run_one(run: Run, stage: str) -> Any:
    run.event(event="started", stage=stage)
    started = time.monotonic()
    try:
        row = _data_stage(run, stage) if stage in DATA_STAGES else _run_stage(run, stage)
    except M1Error as error:
        last = _attempt() >= run.settings.flow.retries
        retried = isinstance(error, _BY_SIGNAL) and not last
        if retried:
            run.event(event="stage killed", stage=stage, message=str(error))
            raise
        get_run_logger().error(str(error))
        seconds = round(time.monotonic() - started, 2)
        row = {"stage": stage, "status": "failed", "reason": str(error), "seconds": seconds}
    run.summary.append(row)
    run.event(event="stage ended", **row)
    if row["status"] == "failed":
        return Failed(message=row["reason"])
    if row["status"] == "skipped":
        return Completed(name="Skipped", message=row["reason"])
    return Completed(message=row["reason"])


def _data_stage(run: Run, stage: str) -> dict[str, Any]:
    name = run.settings.name
    row = run.plan[stage]
    reason = row.reason
    skip = row.action == "skip"
    if not run.force and (run.data_changed or not skip) and dvc.digest(f"{stage}@{name}") is not None:
        reasons = [*dvc.status([f"{stage}@{name}"])[f"{stage}@{name}"], *planning.left_out(run.settings, stage)]
        skip = not reasons
        reason = "; ".join(reasons) or "unchanged: DVC finds the same inputs, command and output"
    tracked = run.tracker.start_stage(run.mlflow_run, stage, None, _attempt(), run.settings)
    _link(stage, tracked)
    summary = {"stage": stage, "reason": reason, "output": f"data/{name}/{stage}"}
    if skip:
        tracked.skip(None, reason)
        return {**summary, "status": "skipped", "seconds": 0.0, "left_out": records.left_out(name, stage)}
    get_run_logger().info("%s runs: %s", stage, reason)
    run.event(event="stage running", stage=stage, reason=reason)
    with _tracked(tracked):
        result = launch.run_data_stage(run.settings, stage, on_line=_logger(), on_tick=_Watch().tick)
        run.data_changed = True
        tracked.finish_data(stage, run.settings)
    return {**summary, "status": "ran", "seconds": result.seconds, "left_out": records.left_out(name, stage)}


def _run_stage(run: Run, stage: str) -> dict[str, Any]:
    parent = run.upstream if _is_first(run, stage) else None
    request = resolve(stage, run.settings, parent=parent or run.runs.get(run.settings.parent_of(stage) or ""))
    output = Path(request.output)
    finished = load_result(output)
    tracked = run.tracker.start_stage(run.mlflow_run, stage, request, _attempt())
    _link(stage, tracked)
    if finished is not None and not run.force:
        reason = f"unchanged: fingerprint {request.fingerprint[:16]} is complete"
        tracked.skip(finished, reason)
        result, own, status = finished, 0.0, "skipped"
    else:
        reason = "forced" if run.force else planning.why_run(request)
        get_run_logger().info("%s runs: %s", stage, reason)
        run.event(event="stage running", stage=stage, reason=reason, output=str(output))
        result, own = _execute(run, request, tracked)
        status = "ran"
    if stage in TRAINING_STAGES:
        run.runs[stage] = output
    return {
        "stage": stage,
        "status": status,
        "reason": reason,
        "seconds": own,
        "inside_seconds": result.seconds if status == "ran" else 0.0,
        "key_metric": result.key_metric,
        "before": result.before,
        "after": result.after,
        "output": str(output.relative_to(paths.ROOT)),
        "checkpoint": result.checkpoint,
        "left_out": result.left_out,
    }


def _execute(run: Run, request: StageRequest, tracked: Any) -> tuple[StageResult, float]:
    started = time.monotonic()
    with _tracked(tracked):
        following = False

        def tick() -> None:
            nonlocal following
            if not following:  # not earlier: a forced run first clears what an earlier one left in the folder
                tracked.follow()
                following = True
            watch.tick()

        watch = _Watch(Path(request.output), request.stage)
        # A forced run is forced once: a retry of it continues.
        force = run.force and _attempt() == 0
        result = launch.run_stage(request, force=force, on_line=_logger(), on_tick=tick)
        own = time.monotonic() - started
        watch.done()
        if not following:
            tracked.follow()
        tracked.finish(result)
    return result, own


def _attempt() -> int:
    """0 for the first try of the present task run."""
    return runtime.task_run.run_count - 1


def _is_first(run: Run, stage: str) -> bool:
    return stage == next(name for name in run.plan if name not in DATA_STAGES)


@contextlib.contextmanager
def _tracked(tracked: Any) -> Iterator[None]:
    """Close the stage's MLflow run as failed whatever ends it; the cause goes on."""
    try:
        yield
    except BaseException as error:
        message = str(error) if isinstance(error, M1Error) else f"stopped by {type(error).__name__}"
        with contextlib.suppress(Exception):
            tracked.fail(message, killed=not isinstance(error, M1Error) or isinstance(error, Interrupted))
        raise


def _logger() -> Callable[[str], None]:
    logger = get_run_logger()
    return lambda line: logger.info("%s", line)


def _link(stage: str, tracked: Any) -> None:
    if tracked.url:
        create_link_artifact(
            key=f"mlflow-{stage}", link=tracked.url, link_text=f"{stage} in MLflow", description="Metrics and lineage"
        )


class _Watch:
    """Once a second while a stage runs: are the servers there, and how far has the stage come?"""

    def __init__(self, output: Path | None = None, stage: str = "") -> None:
        self.output = output
        self.stage = stage
        self.artifact: Any = None
        self.shown = -1.0
        self.next_look = time.monotonic() + _PROGRESS_SECONDS
        self.last_answer = dict.fromkeys(("prefect", "mlflow"), time.monotonic())
        self.urls = {
            "prefect": os.environ.get("PREFECT_API_URL", ""),
            "mlflow": _mlflow_address(),
        }

    def tick(self) -> None:
        if time.monotonic() < self.next_look:
            return
        for name, title in (("prefect", "Prefect"), ("mlflow", "MLflow")):
            if not self.urls[name] or services.answers(f"{self.urls[name]}/health", timeout=3):
                self.last_answer[name] = time.monotonic()
            elif time.monotonic() - self.last_answer[name] > self._patience(name):
                raise ServiceError(
                    f"the {title} server at {self.urls[name]} stopped answering",
                    "Run `m1 up` and then the same command again: it continues from the last complete checkpoint.",
                )
        if self.output is not None and self.last_answer["prefect"] > self.next_look:
            self._show(flow_runs.read_progress(self.output))
        self.next_look = time.monotonic() + _PROGRESS_SECONDS

    @staticmethod
    def _patience(name: str) -> float:
        """A server that lives may only be slow: the machine is busy with our own work."""
        return services.PATIENCE if services.running(name) else _DEAD_PATIENCE

    def done(self) -> None:
        if self.artifact is not None:
            update_progress_artifact(self.artifact, progress=100.0)

    def _show(self, progress: tuple[float, str] | None) -> None:
        if progress is None or progress[0] == self.shown:
            return
        self.shown = progress[0]
        if self.artifact is None:
            self.artifact = create_progress_artifact(progress=self.shown, key=f"progress-{self.stage}")
        else:
            update_progress_artifact(self.artifact, progress=self.shown)
