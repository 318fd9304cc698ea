"""The one flow: every stage in the profile's order, unchanged ones skipped.

The flow decides what runs when; a stage's own process does the work and knows nothing of Prefect. Stage tasks are
called directly, never submitted to a thread: a signal to the flow run (cancelling, `m1 down`) is an exception in the
main thread, and that is what stops the stage's processes.
"""

from __future__ import annotations

import contextlib
import html
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, runtime, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import plan as planning
from flows.watch import Watch
from infra import caller, flow_runs, launch, machine, services, tools
from infra.flow_runs import Event, PlannedStage
from m1 import paths
from m1.config.profile import Profile
from m1.data import dvc, lock
from m1.errors import Checkpointed, Interrupted, M1Error, ServiceError
from m1.planning import preflight
from m1.run.contract import StageRequest, StageResult, finished
from m1.run.registry import parent_of, stage
from m1.run.resolve import resolve
from m1.run.summary import StageRow, Status
from m1.tracking import StageTracker, Tracker, records, report

#: Errors of a stage that a signal ended: another try may help.
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
    summary: list[StageRow] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        flow_runs.write_event(self.folder, event)

    def parent(self, name: str) -> Path | None:
        """The run that a stage starts from, where this flow run knows better than "the newest"."""
        first = next(each for each in self.plan if not stage(each).makes_data)
        given = self.upstream if name == first else None
        return given or self.runs.get(parent_of(self.settings, name) or "")


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
    caller.adopt()
    flow_run_id = str(runtime.flow_run.id)
    folder = flow_runs.register(flow_run_id)
    try:
        settings = planning.load_profile(profile, seed=seed, overrides=overrides)
        chosen = planning.select(settings, start, stop, only)
        run = _prepare(folder, flow_run_id, settings, chosen, upstream, force)
    except M1Error as error:
        flow_runs.write_event(folder, Event("failed", message=str(error)))
        get_run_logger().error(str(error))
        return Failed(message=str(error))
    try:
        failure = _run_stages(run)
    except BaseException:  # cancelled, or stopped with the services
        _close(run, "KILLED")
        raise
    unrecorded = _close(run, "FAILED" if failure else "FINISHED")
    if message := failure or unrecorded:
        run.tell(Event("failed", message=message))
        with contextlib.suppress(Exception):  # it may be the server that has failed
            _show(run)
        return Failed(message=message)
    _show(run)
    run.tell(Event("finished"))
    ran = sum(row.status == "ran" for row in run.summary)
    return Completed(message=f"{len(run.summary)} stages, {ran} of them ran, the others were up to date")


def _run_stages(run: Run) -> str | None:
    """Every stage of the plan in order, up to the first that fails; returns what failed."""
    for name in run.plan:
        state = _stage_task(name, run.settings)(run, name, return_state=True)
        if not state.is_completed():
            return state.message or f"stage {name} ended in state {state.name}"
    return None


def _close(run: Run, outcome: str) -> str | None:
    """Close the MLflow run; returns what went wrong. A dead server must not hide the cause of a failure."""
    try:
        page = _report(run) if outcome == "FINISHED" else None
        run.tracker.finish_flow_run(run.mlflow_run, outcome, run.summary, report=page)
    except M1Error as error:
        return str(error)
    return None


def _report(run: Run) -> Path | None:
    """The report of a run that changed something; what is wrong with it is no fault of the run."""
    if not any(row.status == "ran" for row in run.summary):
        return None
    try:
        return report(run.settings, planning.expected)
    except (M1Error, OSError) as error:
        get_run_logger().warning("no report: %s", error)
        return None


def _show(run: Run) -> None:
    _show_table("summary", map(_cells, run.summary), "What each stage did")


def _show_table(key: str, rows: Iterable[dict[str, str]], description: str) -> None:
    """Keep a table as an artifact; Prefect's page reads cells as Markdown, and would drop what looks like a tag."""
    table = [{name: html.escape(text, quote=False) for name, text in row.items()} for row in rows]
    create_table_artifact(key=key, table=table, description=description)


def _cells(row: StageRow) -> dict[str, str]:
    """A row of the summary for people, what matters first."""
    before, after = ("" if value is None else f"{value:.4g}" for value in (row.before, row.after))
    return {
        "stage": row.stage,
        "status": row.status,
        "seconds": f"{row.seconds:.1f}",
        "key metric": row.key_metric or "",
        "before": before,
        "after": after,
        "reason": row.reason,
        "left out": " ".join(row.left_out),
    }


def _prepare(
    folder: Path, flow_run_id: str, settings: Profile, chosen: list[str], upstream: str | None, force: bool
) -> Run:
    """Check everything that can be checked before work starts.

    Raises:
        M1Error: something would stop the run.
    """
    services.check_disk()
    uri = services.mlflow_url() or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ServiceError("no MLflow server is running", "Start it with `m1 up`.")
    tracker = Tracker.connect(uri)
    parent = None
    if upstream is not None:
        planning.check_upstream(settings, chosen)
        parent = planning.find_upstream(upstream, settings) or tracker.find_run(upstream, settings)
    if any(stage(name).makes_data for name in chosen) and dvc.ensure_profile(settings.name):
        get_run_logger().info("params.yaml: added profile %s, so that dvc.yaml has its data stages", settings.name)
    rows = planning.plan(settings, only=chosen, upstream=parent, force=force)
    to_run = [row.stage for row in rows if row.action == "run"]
    preflight.check(settings, to_run, tools.missing, machine.memory_of_rank(settings.parallel))
    planned = tuple(PlannedStage(row.stage, row.action, row.reason) for row in rows)
    _show_table("plan", map(asdict, planned), f"What the run will do, profile {settings.name}")
    prefect_url = services.flow_run_url(flow_run_id)
    mlflow_run = tracker.start_flow_run(settings, flow_run_id, prefect_url, [row.stage for row in rows])
    url = tracker.url(tracker.client.get_run(mlflow_run))
    text = "this flow run in MLflow"
    create_link_artifact(key="mlflow", link=url, link_text=text, description="What it did, and what it gained")
    flow_runs.write_event(folder, Event("planned", plan=planned, mlflow_url=url))
    return Run(settings, force, parent, tracker, mlflow_run, folder, {row.stage: row for row in rows})


# --- one stage ------------------------------------------------------------------------------------------------------


def _stage_task(name: str, settings: Profile) -> Task[[Run, str], Any]:
    return _run_one.with_options(
        name=name,
        task_run_name=name,
        retries=settings.flow.retries,
        retry_delay_seconds=settings.flow.retry_delay_seconds,
        retry_condition_fn=_was_killed,
    )


def _was_killed(task: object, task_run: object, state: State[Any]) -> bool:
    """Only a stage that a signal ended is worth another try: any other failure would happen again."""
    return isinstance(state.result(raise_on_failure=False), _BY_SIGNAL)


@task(persist_result=False, cache_policy=NO_CACHE)
def _run_one(run: Run, name: str) -> Any:
    run.tell(Event("started", stage=name))
    started = time.monotonic()
    try:
        row = _data_stage(run, name) if stage(name).makes_data else _run_stage(run, name)
    except M1Error as error:
        last = _attempt() >= run.settings.flow.retries
        if isinstance(error, _BY_SIGNAL) and not last:
            run.tell(Event("stage killed", stage=name, message=str(error)))
            raise
        get_run_logger().error(str(error))
        row = StageRow(name, "failed", str(error), seconds=round(time.monotonic() - started, 2))
    run.summary.append(row)
    run.tell(Event("stage ended", stage=name, row=row))
    if row.status == "failed":
        return Failed(message=row.reason)
    return Completed(name="Skipped" if row.status == "skipped" else None, message=row.reason)


def _data_stage(run: Run, name: str) -> StageRow:
    settings = run.settings
    planned = run.plan[name]
    skip, reason = planned.action == "skip", planned.reason
    changes = []
    if not run.force and lock.digest(name, settings.name) is not None:
        changes = dvc.status([f"{name}@{settings.name}"])[f"{name}@{settings.name}"]
        if run.data_changed or not skip:
            reasons = planning.data_reasons(settings, name, changes)
            skip, reason = not reasons, "; ".join(reasons) or planning.UNCHANGED_DATA
    tracked = run.tracker.start_stage(run.mlflow_run, name, None, _attempt(), settings)
    _link(name, tracked)
    output = f"data/{settings.name}/{name}"
    seconds = 0.0
    if skip:
        if changes:  # only comments, say: dvc.lock must be that of the files as they are now
            dvc.commit(f"{name}@{settings.name}")
        tracked.skip(None, reason)
    else:
        get_run_logger().info("%s runs: %s", name, reason)
        run.tell(Event("stage running", stage=name, message=reason))
        with _tracked(tracked):
            seconds = launch.run_data_stage(settings, name, on_line=_logger(), on_tick=Watch().tick).seconds
            run.data_changed = True
            tracked.finish_data(name, settings)
    return StageRow(
        name,
        "skipped" if skip else "ran",
        reason,
        seconds=seconds,
        inside_seconds=seconds,
        output=output,
        left_out=tuple(records.left_out(settings.name, name)),
        mlflow_run=tracked.run_id,
    )


def _run_stage(run: Run, name: str) -> StageRow:
    request = resolve(name, run.settings, tools.missing, parent=run.parent(name))
    done = finished(request)
    tracked = run.tracker.start_stage(run.mlflow_run, name, request, _attempt())
    _link(name, tracked)
    status: Status = "skipped"
    if done is not None and not run.force:
        reason = planning.unchanged(request)
        tracked.skip(done, reason)
        result, seconds = done, 0.0
    else:
        preflight.check(run.settings, [name], tools.missing)
        reason = "forced" if run.force else planning.why_run(request)
        get_run_logger().info("%s runs: %s", name, reason)
        run.tell(Event("stage running", stage=name, message=reason, output=request.output))
        result, seconds = _execute(run, request, tracked)
        status = "ran"
    if stage(name).trains:
        run.runs[name] = request.run
    return StageRow(
        name,
        status,
        reason,
        seconds=seconds,
        inside_seconds=result.seconds if status == "ran" else 0.0,
        key_metric=result.key_metric,
        before=result.before,
        after=result.after,
        output=paths.shown(request.run),
        checkpoint=result.checkpoint,
        left_out=result.left_out,
        mlflow_run=tracked.run_id,
    )


def _execute(run: Run, request: StageRequest, tracked: StageTracker) -> tuple[StageResult, float]:
    """Run the stage, its metrics forwarded as they come; the result, and its wall time in seconds."""
    started = time.monotonic()
    with _tracked(tracked):
        watch = Watch(request.run, request.stage, begin=tracked.follow)
        # A forced run is forced once: a retry of it continues.
        force = run.force and _attempt() == 0
        result = launch.run_stage(request, force=force, on_line=_logger(), on_tick=watch.tick)
        seconds = time.monotonic() - started
        watch.done()
        tracked.finish(result)
    return result, seconds


def _attempt() -> int:
    """0 for the first try of the present task run."""
    return runtime.task_run.run_count - 1


@contextlib.contextmanager
def _tracked(tracked: StageTracker) -> Iterator[None]:
    """Close the stage's MLflow run as failed on any exception, which is raised again."""
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


def _link(name: str, tracked: StageTracker) -> None:
    if tracked.url:
        create_link_artifact(
            key=f"mlflow-{name}", link=tracked.url, link_text=f"{name} in MLflow", description="Metrics and lineage"
        )
