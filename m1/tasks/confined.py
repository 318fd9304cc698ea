"""Reading text that a model wrote, in a process that can be killed.

A response may hold anything. What reads it here is linear in its size and takes some milliseconds, save for one part
that is not ours: Python's own parser, which takes exponential time over some texts, and overflows the C stack of its
process over others. A thread cannot be stopped and a fork of a process that has torch in it is not safe, so the reading
is done by a small Python process of its own, started when it is first needed and used again for every answer. A call
costs about a millisecond and the pickling of what it is given; starting the process costs a quarter of a second.

Rules that are provably linear and bounded (`m1.tasks.logic`) need none of this and stay in the caller's process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: Wall time of one call; the answers of a whole training run take a few milliseconds each.
SECONDS = 2.0
#: Address space of the process.
_MEMORY = 2 * 2**30
_LENGTH = struct.Struct(">Q")
_ROOT = Path(__file__).parents[2]
# Isolated: neither the working folder nor PYTHON* variables decide what is imported.
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from m1.tasks.confined import serve; serve()"


class Overrun(Exception):
    """The call was killed: it took too long or too much memory, or brought down its process."""


class Confined:
    """Calls functions of this project in a process of their own; threads take turns.

    Args:
        seconds: wall time of one call.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
        """What `function` returns; it must be importable by its name, its arguments and result picklable.

        Raises:
            Overrun: see the class.
            Exception: whatever the function raises.
        """
        request = pickle.dumps((self._seconds, function, arguments, named))
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                _send(process.stdin, request)
                raw = _receive(process.stdout)
            except (EOFError, OSError) as error:
                status = self._end()
                raise Overrun(_why(status, self._seconds)) from error
        good, value = pickle.loads(raw)
        if not good:
            raise value
        return value

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, str(_ROOT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        # One that has ended by itself keeps its status: a kill does not reach it any more.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return process.wait()


def _why(status: int | None, seconds: float) -> str:
    return f"it was not read in {seconds:g} s" if status == -signal.SIGALRM else "reading it brought down the reader"


_shared: dict[int, Confined] = {}


def confined(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """Call `function` in the one confined process that this process keeps; see `Confined`."""
    mine = _shared.get(os.getpid())
    if mine is None:  # after a fork the parent's pipes are not ours to use
        _shared.clear()
        mine = _shared.setdefault(os.getpid(), Confined())
        atexit.register(mine.close)
    return mine(function, *arguments, **named)


# --- the other side ---


def serve() -> None:
    """Answer calls on standard input until it is closed.

    The kernel ends a call that takes too long: the default action of SIGALRM needs no help from Python, so that code
    inside the parser is ended as well, and also when the caller is gone.
    """
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        try:
            raw = _receive(sys.stdin.buffer)
        except EOFError:
            return
        seconds, function, arguments, named = pickle.loads(raw)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            result = (True, function(*arguments, **named))
        except Exception as error:  # handed to the caller, who knows which ones text may cause
            error.__traceback__ = error.__context__ = error.__cause__ = None
            result = (False, error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, pickle.dumps(result))


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(_LENGTH.pack(len(content)) + content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """Raises:
    EOFError: the other side is gone.
    """
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    size = _LENGTH.unpack(head)[0]
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content
