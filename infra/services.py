"""Local services: a Prefect server, a Prefect worker and an MLflow server, on the loopback interface only.

Everything they write is below `.m1/`: databases, artifacts, logs, pid files. `up` may be called at any time: it starts
what is missing, restarts what died, and leaves alone what runs. `down` stops exactly what `up` started.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import flow_runs
from infra.dotenv_file import write_block
from infra.process import ProcessRecord, lock_file
from m1 import paths
from m1.errors import ServiceError
from m1.run import derived
from m1.run.derived import WORK_POOL

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
#: A server that is still silent then will stay silent; one that ended is noticed at once.
START_TIMEOUT = 420.0
#: Seconds without an answer after which a server whose process lives counts as hung.
PATIENCE = 60.0
#: Disk space below which a run is refused: a `tiny` run with its checkpoints and data writes about 1 GiB.
MIN_FREE_BYTES = 3 * 1024**3
NAMES = ("prefect", "mlflow", "worker")


@dataclass(frozen=True)
class Status:
    """State of one service: `pid` is None when it is not running."""

    name: str
    pid: int | None
    url: str | None
    healthy: bool
    log: Path


def pid_file(name: str) -> Path:
    return paths.STATE / "services" / f"{name}.json"


def log_file(name: str) -> Path:
    return paths.STATE / "services" / f"{name}.log"


def running(name: str) -> ProcessRecord | None:
    """The live process of a service, or None; one that was started before the checkout was moved counts as hung."""
    record = ProcessRecord.read(pid_file(name))
    here = record is not None and record.extra.get("root") == str(paths.ROOT)
    return record if record is not None and here and record.alive() else None


def prefect_url() -> str | None:
    """Address of the running Prefect server (without /api), or None."""
    record = running("prefect")
    return record.extra["url"] if record else None


def mlflow_url() -> str | None:
    record = running("mlflow")
    return record.extra["url"] if record else None


def flow_run_url(flow_run_id: str) -> str | None:
    """Page of a flow run in the Prefect UI."""
    url = prefect_url()
    return f"{url}/runs/flow-run/{flow_run_id}" if url else None


def client_environment() -> dict[str, str]:
    """Settings for every process that talks to the services; addresses only of those that run."""
    settings = {
        "PREFECT_HOME": str(paths.STATE / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
    }
    if url := prefect_url():
        settings["PREFECT_API_URL"] = f"{url}/api"
    if url := mlflow_url():
        settings["MLFLOW_TRACKING_URI"] = url
    return settings


def _environment(**more: str) -> dict[str, str]:
    """Environment of a child: ours, without settings that would send it to another server or an outer run."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_")) and key not in ("PYTHONSTARTUP", "SERVER_NAME")
    }
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**inherited, **client_environment(), "PATH": search, "PYTHONUNBUFFERED": "1", **more}


def up(say: Callable[[str], None] = lambda text: None) -> dict[str, Status]:
    """Start all services and apply the deployments.

    Raises:
        ServiceError: a service did not become healthy; the message holds the end of its log.
    """
    (paths.STATE / "services").mkdir(parents=True, exist_ok=True)
    with lock_file(paths.STATE / "services" / "lock", patience=START_TIMEOUT + 60) as lock:
        if lock is None:
            raise ServiceError("another `m1 up` or `m1 down` is at work", "Wait for it to end, then try again.")
        for name in derived.update():
            say(f"{name} rewritten: the stages have changed")
        started = [name for name in ("prefect", "mlflow") if not _answers_in_time(name)]
        for name in started:
            say(f"starting the {_TITLES[name]}")
            _start_server(name)
        if "prefect" in started:
            _await_healthy("prefect")
            _stop("worker")  # it would go on asking the old address
        write_dotenv(say)
        _ensure_work_pool()
        fresh_worker = running("worker") is None
        if fresh_worker:
            say("starting the Prefect worker")
            _start_worker()
        for name, message in flow_runs.reconcile(WORK_POOL, worker_is_new=fresh_worker):
            say(f"flow run {name}: {message}")
        _apply_deployments(say)
        if "mlflow" in started:
            _await_healthy("mlflow")
        close_dead_flow_runs(say)
        write_dotenv(say)
        if running("worker") is None:
            raise ServiceError(f"the Prefect worker ended at once: {_tail('worker')}", _see("worker"))
    return status()


def close_dead_flow_runs(say: Callable[[str], None] = lambda text: None) -> None:
    """Tell MLflow of flow runs that died without a word; nothing happens where there is none, or no server."""
    from m1.tracking import Tracker

    folders, url = flow_runs.unclosed(), mlflow_url()
    if not folders or url is None:
        return
    for name in Tracker.connect(url).close_dead(flow_runs.alive()):
        say(f"flow run {name}: closed in MLflow, its process is gone")
    for folder in folders:
        flow_runs.note_closed(folder)


def down(say: Callable[[str], None] = lambda text: None) -> None:
    """Stop flow runs of this checkout, then the services. Nothing that `up` did not start is touched."""
    with lock_file(paths.STATE / "services" / "lock", patience=START_TIMEOUT + 60) as lock:
        if lock is None:
            raise ServiceError("another `m1 up` or `m1 down` is at work", "Wait for it to end, then try again.")
        for flow_run in flow_runs.recorded():
            if flow_run.process.alive():
                say(f"stopping flow run {flow_run.identity}")
                flow_run.process.stop(grace=25)
        for name in ("worker", "mlflow", "prefect"):
            if _stop(name):
                say(f"stopped the {_TITLES[name]}")
        ours: dict[str, str | None] = dict.fromkeys([*client_environment(), "PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
        _keep_dotenv(ours, say)


def status() -> dict[str, Status]:
    """State of every service, by name."""
    result = {}
    for name in NAMES:
        record = running(name)
        url = record.extra.get("url") if record else None
        result[name] = Status(name, record.pid if record else None, url, is_healthy(name), log_file(name))
    return result


def _answers_in_time(name: str) -> bool:
    """Whether the service is healthy; one that lives gets time, for a busy machine is no reason to restart it."""
    deadline = time.monotonic() + PATIENCE
    while not is_healthy(name, timeout=5):
        if running(name) is None or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def is_healthy(name: str, timeout: float = 2.0) -> bool:
    """Whether the service runs and, being a server, answers."""
    record = running(name)
    if record is None:
        return False
    return "health" not in record.extra or answers(record.extra["health"], timeout)


def answers(url: str, timeout: float = 2.0) -> bool:
    """Whether a GET of `url` succeeds; no proxy is used."""
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as response:
            return response.status == 200
    except OSError:
        return False


def check_disk(minimum: int = MIN_FREE_BYTES) -> None:
    """Refuse to start when the disk of the checkout is nearly full.

    Raises:
        ServiceError: fewer than `minimum` bytes are free.
    """
    import shutil

    free = shutil.disk_usage(paths.ROOT).free
    if free < minimum:
        raise ServiceError(
            f"only {free / 1024**3:.1f} GiB free on the disk of {paths.ROOT}, a run needs {minimum / 1024**3:.0f} GiB",
            "Free some space (old runs are in runs/), then try again.",
        )


_TITLES = {"prefect": "Prefect server", "mlflow": "MLflow server", "worker": "Prefect worker"}


def _see(name: str) -> str:
    return f"The whole log is {log_file(name)}; correct the cause, then run `m1 up` again."


def free_port(usual: int) -> int:
    """`usual` if nothing listens there, else a port that the system picks."""
    for port in (usual, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise ServiceError(f"no free port on {HOST}", "Check the limits of this machine.")


def _start_server(name: str) -> None:
    before = ProcessRecord.read(pid_file(name))
    _stop(name)  # it may hang
    # A restarted server keeps its address if it can: open browser tabs and links in old runs go on working.
    usual = before.extra.get("port") if before else None
    if name == "prefect":
        port = free_port(usual or PREFECT_PORT)
        command = ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
        settings = {
            "PREFECT_API_URL": f"http://{HOST}:{port}/api",
            "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{_in_state('prefect', 'prefect.db')}",
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
            "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
        }
        health = f"http://{HOST}:{port}/api/health"
    else:
        port = free_port(usual or MLFLOW_PORT)
        (paths.STATE / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
        command = ["-m", "mlflow", "server", "--app-name", "m1", "--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{_in_state('mlflow', 'mlflow.db')}"]
        command += ["--artifacts-destination", str(_in_state("mlflow", "artifacts"))]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        health = f"http://{HOST}:{port}/health"
    _spawn(name, command, settings, url=f"http://{HOST}:{port}", health=health, port=port)


def _in_state(*parts: str) -> Path:
    """A path below `.m1` from the working folder of the services: in an address, a "?" or "%" of the whole path would
    mean something else."""
    return paths.STATE.relative_to(paths.ROOT).joinpath(*parts)


def _start_worker() -> None:
    command = ["-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process", "--limit", "1"]
    command += ["--name", "m1-worker", "--install-policy", "never", "--no-create-pool-if-not-found"]
    _spawn("worker", command, {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "5"})


def _spawn(name: str, command: list[str], settings: dict[str, str], **extra: Any) -> None:
    log = log_file(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:  # one log per life of the service
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=paths.ROOT,
            env=_environment(**settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )
    ProcessRecord.of(process.pid, root=str(paths.ROOT), **extra).write(pid_file(name))


def _await_healthy(name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    for attempt in range(3):
        while not is_healthy(name, timeout=5):
            if running(name) is None:
                break
            if time.monotonic() > deadline:
                _stop(name)
                raise ServiceError(
                    f"the {_TITLES[name]} gave no answer within {START_TIMEOUT:.0f} s: {_tail(name)}", _see(name)
                )
            time.sleep(0.1)
        else:
            return
        if attempt == 2 or "address already in use" not in log_file(name).read_text(encoding="utf-8").lower():
            break
        _start_server(name)  # somebody took the port between our look and its start
    raise ServiceError(f"the {_TITLES[name]} ended while starting: {_tail(name)}", _see(name))


def _tail(name: str, lines: int = 4) -> str:
    try:
        content = [
            line.strip()
            for line in log_file(name).read_text(errors="replace", encoding="utf-8").splitlines()
            if line.strip()
        ]
    except OSError:
        return "no log"
    return " | ".join(content[-lines:]) or "its log is empty"


def _stop(name: str) -> bool:
    record = ProcessRecord.read(pid_file(name))
    stopped = record is not None and record.stop(grace=10)
    pid_file(name).unlink(missing_ok=True)
    return stopped


# --- what `prefect deployment run` in the checkout reads ------------------------------------------------------------


def write_dotenv(say: Callable[[str], None]) -> None:
    """Tell plain `prefect` and `mlflow` commands in the checkout where the services are."""
    _keep_dotenv(client_environment(), say)


def _keep_dotenv(variables: Mapping[str, str | None], say: Callable[[str], None]) -> None:
    """The services run without it, so a file that cannot be written is only reported."""
    try:
        write_block(paths.ROOT / ".env", variables)
    except ServiceError as error:
        say(f"note: {error}")


# --- work pool and deployments --------------------------------------------------------------------------------------


def _ensure_work_pool() -> None:
    """One flow run at a time: a second one waits in the pool instead of fighting over the machine."""
    os.environ.update(client_environment())
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    # Prefect takes the command apart as a shell does, and fills in what stands in double braces.
    wanted = {"command": shlex.join([sys.executable, "-m", "prefect.engine"]), "working_dir": str(paths.ROOT)}
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(WORK_POOL)
        except ObjectNotFound:
            from prefect.workers.process import ProcessWorker

            template = _with_defaults(ProcessWorker.get_default_base_job_template(), wanted)
            new = WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template, concurrency_limit=1)
            client.create_work_pool(new)
            return
        template = _with_defaults(pool.base_job_template, wanted)
        if pool.base_job_template != template or pool.concurrency_limit != 1 or pool.is_paused:
            change = WorkPoolUpdate(base_job_template=template, concurrency_limit=1, is_paused=False)
            client.update_work_pool(WORK_POOL, change)


def _with_defaults(template: dict[str, Any], defaults: dict[str, str]) -> dict[str, Any]:
    """The job template with these values where a deployment gives none."""
    changed = copy.deepcopy(template)
    for name, value in defaults.items():
        changed["variables"]["properties"][name]["default"] = value
    return changed


def _apply_deployments(say: Callable[[str], None]) -> None:
    """`prefect deploy --all`, unless this server already holds the deployments of this very prefect.yaml and flow."""
    import yaml
    from prefect.client.orchestration import get_client

    sources = [paths.ROOT / "prefect.yaml", paths.ROOT / "flows" / "pipeline.py"]
    # A deployment says in which folder its flow runs.
    told = [str(paths.ROOT).encode(), *(source.read_bytes() for source in sources)]
    digest = hashlib.sha256(b"\0".join(told)).hexdigest()
    stamp = paths.STATE / "prefect" / "deployments.applied"
    names = {entry["name"] for entry in yaml.safe_load(sources[0].read_text(encoding="utf-8"))["deployments"]}
    with get_client(sync_client=True) as client:
        present = {deployment.name for deployment in client.read_deployments()}
    if names <= present and stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return
    say("applying the deployments of prefect.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=paths.ROOT,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ServiceError(f"prefect.yaml could not be applied: {' | '.join(lines[-4:])}", "Correct prefect.yaml.")
    stamp.write_text(digest, encoding="utf-8")
