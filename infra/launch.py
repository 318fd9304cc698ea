"""Start the process of a stage, follow it, and leave nothing of it behind.

Every stage runs below `infra/supervise.py` in a session of its own. Whatever happens to the launching process (an
exception, a signal, even SIGKILL), the stage is first asked to stop by SIGTERM, so that it may save what it can, and
killed after a grace period, its torchrun ranks included.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from infra import dvc
from infra.process import lock_file
from m1 import paths
from m1.errors import Interrupted, ServiceError, StageFailed
from m1.profile import Profile
from m1.stage import (
    KEEP_MEMORY,
    STAGE_INFO,
    StageRequest,
    StageResult,
    interruption,
    load_result,
    write_request,
)

#: Seconds between SIGTERM and SIGKILL; more where the profile gives a stage more time for its checkpoint.
GRACE_SECONDS = 20.0
#: From the end of the time for the checkpoint to SIGKILL.
_MARGIN_SECONDS = 5.0
_TICK_SECONDS = 1.0
_MEND = "Rerun it: a stage continues from its last complete checkpoint."
#: torchrun's own report of a rank that a signal ended.
_RANK_SIGNAL = re.compile(r"Signal (\d+) \((SIG\w+)\) received by PID|exitcode\s*: -(\d+)")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$")
_TORCHRUN_NOISE = ("ChildFailedError", "SignalException")


class StageKilled(StageFailed):
    """The stage did not fail by itself: a signal ended it. Trying again may help."""


@dataclass
class Outcome:
    """How a process ended.

    Attributes:
        returncode: exit code, or minus the signal's number.
        lines: the last lines it printed.
        seconds: wall time from its start to its end.
    """

    returncode: int
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    seconds: float = 0.0


@dataclass(frozen=True)
class DataResult:
    """A data stage that ran: the hash DVC recorded and the wall time in seconds."""

    stage: str
    digest: str | None
    seconds: float


def run_stage(
    request: StageRequest,
    *,
    force: bool = False,
    on_line: Callable[[str], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> StageResult:
    """Execute `request` in its own process(es) and wait for it; at once when its run folder is complete.

    Args:
        force: discard what is in the run folder and do the work again.
        on_line: called with every line the stage prints; without it, lines go to standard output.
        on_tick: called about once a second; an exception it raises stops the stage.
        environment: additional environment variables of the stage.

    Raises:
        StageFailed: it ended without a result; `StageKilled` if a signal ended it.
        ServiceError: another process is writing the same run folder.
        Interrupted: SIGTERM reached this process, and nobody else handles that signal.
        Checkpointed: SIGTERM reached the stage, which has saved its state.
    """
    name = f"stage {request.stage}"
    grace = grace_seconds(request.load_profile())
    with _lease(f"{request.stage}-{request.fingerprint[:16]}", name) as lock:
        finished = load_result(Path(request.output))
        if finished is not None and finished.fingerprint == request.fingerprint and not force:
            return finished
        path = write_request(request, force=force)
        log = path.with_name("log.txt")
        try:
            outcome = _execute(
                stage_command(request, path),
                _stage_environment(request, environment, grace),
                log,
                on_line or _echo,
                on_tick,
                lock,
                grace,
            )
        except Interrupted as error:
            raise interruption(request) or error from None
        result = load_result(Path(request.output))
    if result is None and (stopped := interruption(request)) is not None:
        raise stopped
    if outcome.returncode or result is None:
        raise _failure(name, outcome, log)
    return result


def run_data_stage(
    profile: Profile,
    stage: str,
    on_line: Callable[[str], None] | None = None,
    on_tick: Callable[[], None] | None = None,
) -> DataResult:
    """Run the command that dvc.yaml lists for `<stage>@<profile>` and record its output with DVC.

    Raises:
        StageFailed: the command failed; nothing is recorded then.
        UsageError: dvc.yaml does not list the stage.
        ServiceError: DVC could not record the output.
    """
    target = f"{stage}@{profile.name}"
    log = paths.STATE / "logs" / f"{profile.name}-{stage}.txt"
    with _lease(f"data-{profile.name}-{stage}", f"stage {stage}") as lock:
        command = ["/bin/sh", "-c", dvc.command(target)]
        outcome = _execute(command, _environment({}), log, on_line or _echo, on_tick, lock, GRACE_SECONDS)
        if outcome.returncode:
            raise _failure(f"stage {stage}", outcome, log)
        started = time.monotonic()
        dvc.commit(target)
    return DataResult(stage, dvc.digest(target), outcome.seconds + time.monotonic() - started)


def stage_command(request: StageRequest, path: Path) -> list[str]:
    """The command line of a stage: torchrun with the profile's world size, or plain Python."""
    info = STAGE_INFO[request.stage]
    module = ["-m", info.module, "--request", str(path)]
    if not info.distributed:
        return [sys.executable, *module]
    ranks = request.load_profile().parallel.world_size
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *module]


def grace_seconds(settings: Profile) -> float:
    """Seconds that a stage of this profile has from SIGTERM to SIGKILL."""
    return max(GRACE_SECONDS, settings.checkpoints.stop_seconds + _MARGIN_SECONDS)


def _stage_environment(request: StageRequest, more: dict[str, str] | None, grace: float) -> dict[str, str]:
    threads = str(request.load_profile().parallel.threads_per_rank)
    # Idle OpenMP threads that spin would take the core of the other rank.
    ours = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **KEEP_MEMORY}
    # torchrun would kill its ranks after 30 s, whatever we allow them.
    return _environment({**ours, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(grace)), **(more or {})})


def _environment(more: dict[str, str]) -> dict[str, str]:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A stage knows nothing of Prefect, and a variable of ours must not make it talk to a server.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_RUN"))}
    return {**kept, "PATH": search, "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def _lease(name: str, what: str) -> Iterator[int]:
    """Exclusive right to run; waits as long as an interrupted predecessor may need to stop."""
    with lock_file(paths.STATE / "locks" / name, patience=GRACE_SECONDS + 10) as lock:
        if lock is None:
            raise ServiceError(
                f"{what}: another process is running it with the same inputs",
                "Wait for it to end, or stop it, then try again.",
            )
        yield lock


def _execute(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None] | None,
    lock: int,
    grace: float,
) -> Outcome:
    log.parent.mkdir(parents=True, exist_ok=True)
    supervisor = str(Path(__file__).with_name("supervise.py"))
    started = time.monotonic()
    with open(log, "a") as file, _sigterm_raises():
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor, str(os.getpid()), str(grace), *command],
            cwd=paths.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),  # the run folder stays ours until the last rank is gone, whatever happens to us
        )
        follower = _Follower(process, file, on_line, on_tick, grace)
        try:
            follower.follow()
            process.wait()
        except BaseException:
            follower.stop()
            raise
    return Outcome(process.returncode, follower.lines, time.monotonic() - started)


class _Follower:
    """Reads what the process prints, line by line, into the log and to the caller."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        log: TextIO,
        on_line: Callable[[str], None],
        on_tick: Callable[[], None] | None,
        grace: float,
    ) -> None:
        self.process = process
        self.log = log
        self.on_line = on_line
        self.on_tick = on_tick
        self.grace = grace
        self.lines: deque[str] = deque(maxlen=400)
        self._rest = b""

    def follow(self, seconds: float | None = None) -> None:
        """Until the process closes its output, or for at most `seconds`."""
        assert self.process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        next_tick = time.monotonic() + _TICK_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while deadline is None or time.monotonic() < deadline:
                if selector.select(max(0.0, next_tick - time.monotonic())):
                    chunk = os.read(self.process.stdout.fileno(), 65536)
                    self._take(chunk)
                    if not chunk:
                        return
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + _TICK_SECONDS
                    if self.on_tick is not None:
                        self.on_tick()

    def stop(self) -> None:
        """SIGTERM to the supervisor, which ends the whole tree in good order; SIGKILL to all as the last resort."""
        self.on_tick = None
        self.on_line = lambda line: None
        with contextlib.suppress(BaseException):  # a second signal must not cut the clean-up short
            self.process.terminate()
            self.follow(self.grace + 5)
        from infra.supervise import descendants

        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired, BaseException):
                self.process.wait(1)
        if self.process.poll() is None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def _take(self, chunk: bytes) -> None:
        *complete, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if not chunk and self._rest:
            complete, self._rest = [self._rest], b""
        for raw in complete:
            line = raw.decode(errors="replace").rstrip()
            self.log.write(line + "\n")
            self.log.flush()
            self.lines.append(line)
            if line:
                self.on_line(line)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Make SIGTERM an exception where nobody (Prefect does) handles it, so that the stage is stopped in good order."""
    usable = threading.current_thread() is threading.main_thread()
    if not usable or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handler(number: int, frame: FrameType | None) -> Any:
        raise Interrupted("stopped by SIGTERM", _MEND)

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _echo(line: str) -> None:
    print(line, flush=True)


def _failure(name: str, outcome: Outcome, log: Path) -> StageFailed:
    """One line: what, how it ended, the stage's own words, where to read more, how to mend."""
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
    return kind(f"{name} {how}{words}", f"Log: {_shown(log)}. {_MEND}")


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


def _shown(path: Path) -> str:
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)
