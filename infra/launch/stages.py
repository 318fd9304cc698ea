"""Run one stage in processes of its own and wait for its result."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from infra.launch.base import Job, Launcher, Outcome
from infra.launch.local import LocalLauncher
from infra.process import lock_file
from m1 import paths
from m1.config.profile import Profile
from m1.data import dvc, lock
from m1.errors import Interrupted, ServiceError, StageFailed
from m1.run import folder, identity
from m1.run.contract import StageRequest, StageResult, finished, load_result
from m1.run.registry import stage
from m1.training.environment import KEEP_MEMORY

#: Seconds between SIGTERM and SIGKILL; more where the profile gives a stage more time for its checkpoint.
GRACE_SECONDS = 20.0
#: From the end of the time for the checkpoint to SIGKILL.
_MARGIN_SECONDS = 5.0
#: Bytes below which a disk counts as full: less than any file of a stage that matters.
FULL = 2**20
_AGAIN = "Rerun it: a stage continues from its last complete checkpoint."
#: torchrun's own report of a rank that a signal ended.
_RANK_SIGNAL = re.compile(r"Signal (\d+) \((SIG\w+)\) received by PID|exitcode\s*: -(\d+)")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$")
_TORCHRUN_NOISE = ("ChildFailedError", "SignalException")

OnLine = Callable[[str], None]
OnTick = Callable[[], None]


class StageKilled(StageFailed):
    """The stage did not fail by itself: a signal ended it. Trying again may help."""


@dataclass(frozen=True)
class DataResult:
    """A data stage that ran: the hash DVC recorded and the wall time in seconds."""

    stage: str
    digest: str | None
    seconds: float


def _echo(line: str) -> None:
    print(line, flush=True)


def _nothing() -> None:
    pass


def run_stage(
    request: StageRequest,
    *,
    force: bool = False,
    on_line: OnLine = _echo,
    on_tick: OnTick = _nothing,
    environment: Mapping[str, str] | None = None,
) -> StageResult:
    """Execute `request` in its own process(es) and wait for it; at once when its run folder is complete.

    Args:
        force: discard what is in the run folder and do the work again.
        on_line: called with every line the stage prints.
        on_tick: called about once a second; an exception it raises stops the stage.
        environment: additional environment variables of the stage.

    Raises:
        StageFailed: it ended without a result; `StageKilled` if a signal ended it.
        ServiceError: another process is writing the same run folder.
        Interrupted: SIGTERM reached this process, and nobody else handles that signal.
        Checkpointed: SIGTERM reached the stage, which has saved its state.
    """
    name = f"stage {request.stage}"
    settings = request.load_profile()
    with _lease(f"{request.stage}-{request.fingerprint[:16]}", name) as lease:
        done = finished(request)
        if done is not None and not force:
            return done
        with _disk_of(request):
            path = folder.prepare(request.run, request, force=force)
        job = Job(
            name=name,
            command=stage_command(request, settings, path),
            environment=_stage_environment(settings, environment or {}),
            log=request.run / folder.LOG,
            grace=grace_seconds(settings),
            lock=lease,
        )
        try:
            outcome = _execute(LocalLauncher(), job, on_line, on_tick)
        except Interrupted as error:
            raise folder.read_interruption(request.run, request.stage) or error from None
        result = load_result(request.run)
    if result is None and (stopped := folder.read_interruption(request.run, request.stage)) is not None:
        raise stopped
    if outcome.returncode or result is None:
        with _disk_of(request):
            raise _failure(job, outcome)
    return result


@contextlib.contextmanager
def _disk_of(request: StageRequest) -> Iterator[None]:
    """What fails on a full disk is named so, whatever its own words."""
    try:
        yield
    except (OSError, StageFailed) as error:
        place = next(path for path in (request.run, *request.run.parents) if path.exists())
        if shutil.disk_usage(place).free >= FULL:
            raise
        saved = sorted(request.run.glob("checkpoints/*/manifest.json"))
        goes_on = f"it goes on from {paths.shown(saved[-1].parent)}" if saved else "no checkpoint was complete yet"
        raise ServiceError(
            f"stage {request.stage}: the disk of {paths.shown(request.run)} is full",
            f"Free space (old runs are in runs/), then rerun: {goes_on}.",
        ) from error


def run_data_stage(
    profile: Profile, stage_name: str, on_line: OnLine = _echo, on_tick: OnTick = _nothing
) -> DataResult:
    """Run the command that dvc.yaml lists for `<stage>@<profile>` and record its output with DVC.

    Raises:
        StageFailed: the command failed; nothing is recorded then.
        UsageError: dvc.yaml does not list the stage.
        ServiceError: DVC could not record the output.
    """
    target = f"{stage_name}@{profile.name}"
    log = paths.STATE / "logs" / f"{profile.name}-{stage_name}.txt"
    with _lease(f"data-{profile.name}-{stage_name}", f"stage {stage_name}") as lease:
        command = ("/bin/sh", "-c", dvc.command(target))
        job = Job(f"stage {stage_name}", command, _environment({}), log, GRACE_SECONDS, lease)
        outcome = _execute(LocalLauncher(), job, on_line, on_tick)
        if outcome.returncode:
            raise _failure(job, outcome)
        started = time.monotonic()
        record_data_set(profile, stage_name)
    seconds = outcome.seconds + time.monotonic() - started
    return DataResult(stage_name, lock.digest(stage_name, profile.name), seconds)


def record_data_set(profile: Profile, stage_name: str) -> None:
    """Record the data set as it is now, in dvc.lock and in DVC's cache.

    Raises:
        ServiceError: DVC failed.
    """
    dvc.commit(f"{stage_name}@{profile.name}")
    if (digest := lock.digest(stage_name, profile.name)) is not None:
        identity.note_recorded(stage(stage_name), profile, digest)


def stage_command(request: StageRequest, profile: Profile, path: Path) -> tuple[str, ...]:
    """The command line of a stage: torchrun with the profile's world size, or plain Python."""
    record = stage(request.stage)
    module = ("-m", record.package, "--request", str(path))
    if not record.distributed:
        return (sys.executable, *module)
    # By its own name a machine may not find itself, and its ranks need no other way to each other.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    return (sys.executable, *torchrun, "--nproc-per-node", str(profile.parallel.world_size), *module)


def grace_seconds(profile: Profile) -> float:
    """Seconds that a stage of this profile has from SIGTERM to SIGKILL."""
    return max(GRACE_SECONDS, profile.checkpoints.stop_seconds + _MARGIN_SECONDS)


def _stage_environment(profile: Profile, more: Mapping[str, str]) -> dict[str, str]:
    # Idle OpenMP threads that spin would take the core of the other rank.
    ours = {"OMP_NUM_THREADS": str(profile.parallel.threads_per_rank), "OMP_WAIT_POLICY": "PASSIVE", **KEEP_MEMORY}
    if Path("/sys/class/net/lo").exists():
        ours["GLOO_SOCKET_IFNAME"] = "lo"
    # torchrun would kill its ranks after 30 s, whatever we allow them.
    return _environment({**ours, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(grace_seconds(profile))), **more})


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A stage knows nothing of Prefect, and a variable of ours must not make it talk to a server.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_RUN"))}
    return {**kept, "PATH": search, "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def _lease(name: str, what: str) -> Iterator[int]:
    """Exclusive right to run; waits as long as an interrupted predecessor may need to stop."""
    with lock_file(paths.STATE / "locks" / name, patience=GRACE_SECONDS + 10) as lease:
        if lease is None:
            raise ServiceError(
                f"{what}: another process is running it with the same inputs",
                "Wait for it to end, or stop it, then try again.",
            )
        yield lease


def _execute(launcher: Launcher, job: Job, on_line: OnLine, on_tick: OnTick) -> Outcome:
    """Submit a job and follow it to its end; an exception while waiting stops the job."""
    with _sigterm_raises():
        handle = launcher.submit(job)
        try:
            return launcher.follow(handle, on_line, on_tick)
        except BaseException:
            launcher.stop(handle)
            raise


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Make SIGTERM an exception where nobody (Prefect does) handles it, so that the stage is stopped in good order."""
    usable = threading.current_thread() is threading.main_thread()
    if not usable or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM", _AGAIN)

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _failure(job: Job, outcome: Outcome) -> StageFailed:
    """One line: what, how it ended, the stage's own words, where to read more, how to go on."""
    number = _signal_of(outcome)
    killed = number is not None
    if number is not None:
        how = f"was killed by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            how += " (by hand, or because the memory was full)"
    elif outcome.returncode:
        how = f"ended with exit code {outcome.returncode}"
    else:
        how = "ended without a result"
    said = None if killed else _last_words(outcome.lines)
    words = f": {said.rstrip('.')}" if said else ""
    kind = StageKilled if killed else StageFailed
    return kind(f"{job.name} {how}{words}", f"Log: {paths.shown(job.log)}. {_AGAIN}")


def _signal_of(outcome: Outcome) -> int | None:
    """The signal that ended the process or, by torchrun's report, one of its ranks; SIGTERM counts last."""
    if outcome.returncode < 0:
        return -outcome.returncode
    if not outcome.returncode:
        return None
    found = [int(match[1] or match[3]) for line in outcome.lines for match in _RANK_SIGNAL.finditer(line)]
    # torchrun itself sends SIGTERM to the ranks that are left, after one of them has failed.
    found = [number for number in found if number != signal.SIGTERM]
    return found[0] if found else None


def _last_words(lines: deque[str]) -> str | None:
    """The stage's `error: ...` line or, from a traceback, the exception."""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    raised = [m[1] for line in lines if (m := _EXCEPTION.match(line)) and not any(t in m[1] for t in _TORCHRUN_NOISE)]
    return raised[-1] if raised else None
