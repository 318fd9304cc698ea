"""Processes by identity: a pid alone is not enough, since the system hands old numbers out again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from infra.supervise import descendants
from m1 import paths
from m1.files import write_json

#: `Popen` returns when the child's exec has begun; for a moment, longer on a busy machine, its command line is empty.
EXEC_SECONDS = 5.0


@dataclass(frozen=True)
class ProcessRecord:
    """One process, as written to a pid file.

    Attributes:
        started: when the process started, in a form that no change of the clock touches; see `start_mark`.
        command: its command line.
        checkout: the checkout that it was started for; see `checkout_mark`.
        extra: what else the writer wants to remember, for example a port.
    """

    pid: int
    started: str
    command: list[str]
    checkout: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pid: int, **extra: Any) -> ProcessRecord:
        process = psutil.Process(pid)
        command, deadline = process.cmdline(), time.monotonic() + EXEC_SECONDS
        while not command and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.001)
            command = process.cmdline()
        return cls(pid, start_mark(pid), command, checkout_mark(), extra)

    @classmethod
    def read(cls, path: Path) -> ProcessRecord | None:
        """The record in `path`, or None when there is none that can be read."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    def alive(self) -> bool:
        """Whether this very process still runs (not another one that was given its number), for this checkout.

        A copy of a checkout has its pid files, and none of its processes.
        """
        if self.checkout != checkout_mark():
            return False
        try:
            process = psutil.Process(self.pid)
            same = start_mark(self.pid) == self.started and process.cmdline() == self.command
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def orphans(self) -> list[int]:
        """Processes of the session that this process led, after it has died: what it started and nobody ended.

        A number is given to no other process as long as a session has it, so they are its own.
        """
        if self.checkout != checkout_mark() or _exists(self.pid) or self.started.partition(":")[0] != _boot():
            return []
        found = [process.pid for process in psutil.process_iter() if _session(process.pid) == self.pid]
        return [pid for pid in found if _exists(pid)]

    def stop(self, grace: float) -> bool:
        """End the process and all below it: SIGTERM, `grace` seconds, SIGKILL. False if nothing was running."""
        if not self.alive():
            return _end(self.orphans(), grace)
        below = descendants(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self.alive() and time.monotonic() < deadline:
            _reap(self.pid)
            time.sleep(0.05)
        below = [pid for pid in {*below, *descendants(self.pid)} if _exists(pid)]
        # Children get their own chance: a supervisor among them ends a stage in good order.
        _end(below, grace, self.pid)
        return True


def _end(pids: list[int], grace: float, *last: int) -> bool:
    """SIGTERM to processes, `grace` seconds, then SIGKILL to them and to `last`. False if there are none."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        targets = [pid for pid in (*pids, *(last if number == signal.SIGKILL else ())) if _exists(pid)]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while any(_exists(pid) for pid in targets) and time.monotonic() < deadline:
            for pid in targets:
                _reap(pid)
            time.sleep(0.05)
    return bool(pids)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def checkout_mark() -> str:
    """Which checkout this is: the device and inode of its folder, which a copy does not have and a moved one keeps."""
    stat = paths.ROOT.stat()
    return f"{stat.st_dev}:{stat.st_ino}"


def start_mark(pid: int) -> str:
    """When a process started: the boot of this machine, and clock ticks since then. Seconds where there is no /proc.

    The time of day would not do: after a change of the clock, every process would look like another one.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    if not _boot():
        return f"{psutil.Process(pid).create_time():.0f}"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    return f"{_boot()}:{fields[19]}"


def _boot() -> str:
    """Identity of this run of the machine; empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _reap(pid: int) -> None:
    """Collect the process if it is a child of ours, or it stays a zombie."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def lock_file(path: Path, patience: float) -> Iterator[int | None]:
    """Exclusive lock on `path`; yields its descriptor, or None when it could not be had in `patience` seconds.

    A child that inherits the descriptor keeps the lock after this process has died.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield None
                    return
                time.sleep(0.1)
        yield file.fileno()


def tree_memory(roots: list[int]) -> int:
    """Memory of these processes and all below them, in bytes; shared pages are counted once (PSS) where known."""
    total = 0
    for pid in {pid for root in roots for pid in (root, *descendants(root))}:
        with contextlib.suppress(psutil.Error, OSError):
            total += _memory(pid)
    return total


def _memory(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if rollup.exists():
        for line in rollup.read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return psutil.Process(pid).memory_info().rss
