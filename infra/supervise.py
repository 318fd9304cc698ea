"""Run one command and leave nothing behind: `python supervise.py PARENT_PID GRACE_SECONDS COMMAND...`.

The launcher starts every stage through this small program. It ends every process below itself when the launcher dies
(also by SIGKILL, when no clean-up code of the launcher can run), when it is sent SIGTERM or SIGINT, and when the
command itself ends but left children. It uses the standard library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

_POLL_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_HANDLED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


def descendants(root: int) -> list[int]:
    """Every process below `root`, whatever session or process group it moved to."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        for pid in children.get(queue.pop(), ()):
            found.append(pid)
            queue.append(pid)
    return found


def _parents() -> list[tuple[int, int]]:
    if not os.path.isdir("/proc/self"):
        listing = subprocess.run(
            ["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, encoding="utf-8", errors="replace"
        ).stdout
        return [(int(pid), int(parent)) for pid, parent in (line.split() for line in listing.splitlines())]
    pairs = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                pairs.append((int(name), int(parent)))
    return pairs


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _in_child() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # should this supervisor itself be killed
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)


class Supervisor:
    def __init__(self, parent: int, grace: float, command: list[str]) -> None:
        self.parent = parent
        self.grace = grace
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        # Orphans of the command become our children instead of init's, so they stay findable.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self.child = os.fork()
        if self.child == 0:
            _in_child()
            try:
                os.execvp(command[0], command)
            except OSError as error:
                print(f"error: cannot start {command[0]}: {error.strerror}", flush=True)
                os._exit(127)
        self.status: int | None = None

    def run(self) -> int:
        """Wait for the command; returns its wait status once every descendant is gone."""
        deadline: float | None = None
        while True:
            self._reap()
            ending = deadline is not None or self.status is not None or os.getppid() != self.parent
            # Not while the command works: looking through all processes takes a hundredth of a core.
            alive = descendants(os.getpid()) if ending else []
            if self.status is not None and not alive:
                return self.status
            if deadline is None and ending:
                deadline = self._terminate(alive)
            if deadline is not None and time.monotonic() > deadline:
                self._signal(alive, signal.SIGKILL)
            received = _wait_signal()
            if received in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) and deadline is None:
                deadline = self._terminate(descendants(os.getpid()))

    def _terminate(self, alive: list[int]) -> float:
        self._signal(alive, signal.SIGTERM)
        return time.monotonic() + self.grace

    @staticmethod
    def _signal(pids: list[int], number: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.status = status


def _wait_signal() -> int | None:
    if hasattr(signal, "sigtimedwait"):
        info = signal.sigtimedwait(_HANDLED, _POLL_SECONDS)
        return info.si_signo if info else None
    time.sleep(_POLL_SECONDS)
    pending = signal.sigpending() & _HANDLED
    return signal.sigwait(pending) if pending else None


def main(argv: list[str]) -> None:
    status = Supervisor(int(argv[0]), float(argv[1]), argv[2:]).run()
    if os.WIFSIGNALED(status):  # end the same way, so that the launcher sees the true cause
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(sys.argv[1:])
