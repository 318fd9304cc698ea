"""Jobs as processes of this machine.

Every job runs below `infra/supervise.py` in a session of its own. Whatever happens to the launching process (an
exception, a signal, even SIGKILL), the job is first asked to stop by SIGTERM, so that it may save what it can, and
killed after a grace period, its torchrun ranks included.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from infra.launch.base import Handle, Job, Outcome
from infra.supervise import descendants
from m1 import paths

_TICK_SECONDS = 1.0
_SUPERVISOR = Path(__file__).resolve().parents[1] / "supervise.py"


class LocalHandle:
    """A supervisor with the job below it."""

    def __init__(self, job: Job, process: subprocess.Popen[bytes], log: TextIO) -> None:
        self.job, self.process, self.log = job, process, log
        self.started = time.monotonic()
        self.lines: deque[str] = deque(maxlen=400)
        self._rest = b""

    @property
    def identity(self) -> str:
        return str(self.process.pid)

    def read(self, on_line: Callable[[str], None], on_tick: Callable[[], None], seconds: float | None = None) -> None:
        """Take what the job prints until it closes its output, or for at most `seconds`."""
        assert self.process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        next_tick = time.monotonic() + _TICK_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while deadline is None or time.monotonic() < deadline:
                if selector.select(max(0.0, next_tick - time.monotonic())):
                    chunk = os.read(self.process.stdout.fileno(), 65536)
                    self._take(chunk, on_line)
                    if not chunk:
                        return
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + _TICK_SECONDS
                    on_tick()

    def close_log(self) -> None:
        with contextlib.suppress(OSError):
            self.log.close()

    def _take(self, chunk: bytes, on_line: Callable[[str], None]) -> None:
        *complete, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if not chunk and self._rest:
            complete, self._rest = [self._rest], b""
        for raw in complete:
            line = raw.decode(errors="replace").rstrip()
            with contextlib.suppress(OSError):  # its disk is full: the job meets that itself, and says so
                self.log.write(line + "\n")
                self.log.flush()
            self.lines.append(line)
            if line:
                on_line(line)


class LocalLauncher:
    """See `infra.launch.base.Launcher`."""

    def submit(self, job: Job) -> LocalHandle:
        """Start the job below a supervisor."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(job.log, "a", encoding="utf-8")  # noqa: SIM115  (closed when the job has ended)
        with contextlib.suppress(OSError):
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(job.command)}\n")
            log.flush()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid()), str(job.grace), *job.command],
            cwd=paths.ROOT,
            env=dict(job.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=() if job.lock is None else (job.lock,),
        )
        return LocalHandle(job, process, log)

    def follow(self, handle: Handle, on_line: Callable[[str], None], on_tick: Callable[[], None]) -> Outcome:
        """Wait until the job and everything below it has ended."""
        assert isinstance(handle, LocalHandle)
        handle.read(on_line, on_tick)
        handle.process.wait()
        handle.close_log()
        return Outcome(handle.process.returncode, handle.lines, time.monotonic() - handle.started)

    def stop(self, handle: Handle) -> None:
        """SIGTERM to the supervisor, which ends the whole tree in good order; SIGKILL to all as the last resort."""
        assert isinstance(handle, LocalHandle)
        process = handle.process
        with contextlib.suppress(BaseException):  # a second signal must not cut the clean-up short
            process.terminate()
            handle.read(lambda line: None, lambda: None, handle.job.grace + 5)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired, BaseException):
                process.wait(1)
        if process.poll() is None:
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        handle.close_log()

    def reattach(self, job: Job, identity: str) -> None:
        """Never: a local job ends with the process that launched it."""
        return None
