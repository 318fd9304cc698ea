"""`m1 run`: start a flow run, show how it goes, and end with its table."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import caller, flow_runs, machine, services, tools
from infra.flow_runs import Event, EventKind
from infra.launch import grace_seconds
from infra.process import tree_memory
from m1.cli.console import show
from m1.cli.display import Display
from m1.cli.tables import summary_table
from m1.errors import Checkpointed, ServiceError, StageFailed
from m1.planning import preflight
from m1.run.contract import load_request
from m1.run.folder import read_interruption
from m1.run.summary import StageRow

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

DEPLOYMENT = "m1/full"
_POLL_SECONDS = 0.5
#: Between two questions to the Prefect server. Each costs it some 10 ms of the cores that train.
_STATE_SECONDS = 3.0
_MEMORY_SECONDS = 2.0
#: How long a flow run may take to end by itself once it has been told to, besides what its stage needs.
_STOP_PATIENCE = 30.0
_AGAIN = "Run the same command again: it continues from the last complete checkpoint."


@dataclass
class Watched:
    """A flow run seen from outside."""

    identity: str
    folder: Path
    started: float
    peak_memory: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def summary(self) -> list[StageRow]:
        return [event.row for event in self.events if event.row is not None]

    def interruption(self) -> Checkpointed | None:
        """How the last stage ended, if SIGTERM ended it after a checkpoint."""
        running = self.last("stage running")
        request = load_request(Path(running.output)) if running and running.output else None
        return read_interruption(request.run, request.stage, since=self.started) if request else None

    def last(self, kind: EventKind) -> Event | None:
        return next((event for event in reversed(self.events) if event.kind == kind), None)


def run(parameters: dict[str, Any]) -> int:
    """Run deployment `m1/full` with these parameters and wait; returns the exit code.

    Raises:
        M1Error: bad input, a service that died, or the run failed.
    """
    started = time.time()
    signal.signal(signal.SIGTERM, _interrupt)
    grace = _check_before(parameters)
    services.up(lambda text: print(text, flush=True))
    services_seconds = time.time() - started
    identity, name = _create(parameters)
    url = services.flow_run_url(identity)
    print(f"flow run {name}: {url}", flush=True)
    watched = Watched(identity, flow_runs.folder_of(identity), started)
    try:
        state, message = _wait(watched)
    except KeyboardInterrupt:
        print("\ncancelling the flow run ...", file=sys.stderr, flush=True)
        _cancel(identity, grace)
        if (saved := watched.interruption()) is not None:
            print(f"flow run {name} was cancelled", file=sys.stderr)
            raise saved from None
        raise StageFailed(f"flow run {name} was cancelled", _AGAIN) from None
    except ServiceError as error:
        _give_up(identity, str(error), grace)
        raise
    _report(watched, services_seconds, url)
    if state == "COMPLETED":
        return 0
    if state == "CRASHED":
        services.close_dead_flow_runs()
    if (saved := watched.interruption()) is not None:
        raise saved
    failed = watched.last("failed")
    # The line of the stage itself says more than the state of the run.
    text = failed.message if failed else message or f"ended in state {state}"
    print(f"error: {text}", file=sys.stderr)
    return StageFailed.exit_code


def _check_before(parameters: dict[str, Any]) -> float:
    """Bad input is refused before any service is started. The flow checks the same again.

    Returns:
        Seconds that a stage of the profile has to stop.
    """
    from flows import plan as planning

    settings = planning.load_profile(
        parameters["profile"], seed=parameters["seed"], overrides=parameters["overrides"] or {}
    )
    stages = planning.select(settings, parameters["start"], parameters["stop"], parameters["only"])
    preflight.check(settings, stages, lambda need: None, machine.memory_of_rank(settings.parallel))
    services.check_disk()
    upstream, parent = parameters["upstream"], None
    if upstream is not None:
        planning.check_upstream(settings, stages)
        parent = planning.find_upstream(upstream, settings)
    known = upstream is None or parent is not None  # a name in MLflow is looked up by the flow, when the server is up
    if known and preflight.unmet(settings, stages, tools.missing):  # irrelevant if all that needs it is done
        rows = planning.plan(settings, only=stages, upstream=parent, force=bool(parameters["force"]))
        preflight.check(settings, [row.stage for row in rows if row.action == "run"], tools.missing)
    return grace_seconds(settings)


def _create(parameters: dict[str, Any]) -> tuple[str, str]:
    os.environ.update(services.client_environment())
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        variables = {"env": caller.leave()}
        flow_run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, job_variables=variables)
    return str(flow_run.id), flow_run.name


def _wait(watched: Watched) -> tuple[str, str | None]:
    """Follow the run to its end; returns the type and message of its final state."""
    from prefect.client.orchestration import get_client

    next_memory = next_look = next_state = 0.0
    unanswered: float | None = None
    with Display() as display, get_client(sync_client=True) as client:
        while True:
            now = time.monotonic()
            watched.events = flow_runs.read_events(watched.folder)
            display.show(watched.events)
            if now >= next_memory:
                watched.peak_memory = max(watched.peak_memory, _memory())
                next_memory = now + _MEMORY_SECONDS
            if now >= next_look:
                next_look = now + 1.0
                _check_processes(watched)
            if now >= next_state:
                next_state = now + _STATE_SECONDS
                run = _look(client, watched.identity)
                if run is None:
                    unanswered = unanswered or now
                    if now - unanswered > services.PATIENCE:
                        raise ServiceError("the Prefect server gives no answer", f"Run `m1 up`. {_AGAIN}")
                    continue
                unanswered = None
                if run.state is not None and run.state.is_final():
                    watched.events = flow_runs.read_events(watched.folder)
                    display.show(watched.events)
                    return run.state.type.value, run.state.message
                display.waiting((run.state and run.state.name) or "unknown", len(watched.events))
            time.sleep(_POLL_SECONDS)


def _look(client: SyncPrefectClient, identity: str) -> FlowRun | None:
    """The flow run as the server knows it; None where it gives no answer, which it may do at any moment."""
    import httpx

    if not services.is_healthy("prefect", timeout=3):
        return None
    try:
        return client.read_flow_run(identity)  # type: ignore[arg-type]
    except httpx.TransportError:
        return None


def _check_processes(watched: Watched) -> None:
    """A dead service is noticed by its process, at once."""
    for name, title in (("prefect", "Prefect server"), ("worker", "Prefect worker"), ("mlflow", "MLflow server")):
        if services.running(name) is None:
            raise ServiceError(
                f"the {title} died while the flow run was going on (log: {services.log_file(name)})", _AGAIN
            )


def _memory() -> int:
    records = [services.running(name) for name in services.NAMES]
    return tree_memory([os.getpid(), *(record.pid for record in records if record)])


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _cancel(identity: str, grace: float) -> None:
    """Ask Prefect to cancel; make sure of it ourselves if that takes too long."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled, Cancelling

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with get_client(sync_client=True) as client:
            started = flow_runs.process_of(identity) is not None
            state: Any = Cancelling() if started else Cancelled()
            client.set_flow_run_state(identity, state, force=not started)  # type: ignore[arg-type]
            deadline = time.monotonic() + grace + _STOP_PATIENCE
            while time.monotonic() < deadline:
                run = client.read_flow_run(identity)  # type: ignore[arg-type]
                process = flow_runs.process_of(identity)
                if run.state and run.state.is_final() and (process is None or not process.alive()):
                    return
                time.sleep(0.3)
            _stop(identity, grace)
            client.set_flow_run_state(identity, Cancelled(), force=True)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        _stop(identity, grace)
    except Exception as error:
        _stop(identity, grace)
        raise ServiceError(f"the flow run was stopped, but Prefect could not be told ({error})", _AGAIN) from error


def _give_up(identity: str, message: str, grace: float) -> None:
    """A service died: end the run's processes and, where Prefect still answers, mark the run as failed."""
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    _stop(identity, grace)
    if not services.is_healthy("prefect", timeout=5):
        return  # `m1 up` marks the run when it finds its process gone
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(identity, Failed(message=message), force=True)  # type: ignore[arg-type]


def _stop(identity: str, grace: float) -> None:
    """End the flow run's process without Prefect's help; a supervisor ends the stage below it in good order."""
    process = flow_runs.process_of(identity)
    if process is not None:
        process.stop(grace + 5)


def _report(watched: Watched, services_seconds: float, url: str | None) -> None:
    summary = watched.summary
    if summary:
        show(summary_table(summary))
        for row in summary:
            for part in row.left_out:
                print(f"{row.stage}: {part}")
    wall = time.time() - watched.started
    own = sum(row.seconds for row in summary)
    # What a stage measures itself begins after its imports; the difference is the start of its processes.
    begin = sum(row.seconds - row.inside_seconds for row in summary if row.inside_seconds)
    rest = max(0.0, wall - own)
    print(
        f"{wall:.0f} s in all: stages {own:.0f} s (of which starting their processes {begin:.0f} s), orchestration "
        f"{rest:.0f} s ({100 * rest / wall:.1f}%, of which waiting for the services {services_seconds:.0f} s)"
    )
    print(f"peak memory of all processes: {watched.peak_memory / 1024**3:.2f} GiB")
    print(f"Prefect: {url}")
    planned = watched.last("planned")
    if planned and planned.mlflow_url:
        print(f"MLflow:  {planned.mlflow_url}")
