"""What a sandbox must do: what goes into it and what comes out. `infra.sandbox` is one, with Docker."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from m1.errors import UsageError


class Kind(enum.Enum):
    """How a job ended. Only OK says that the command ran to its own end; what it did there is in `exit_code`."""

    OK = "ok"  # the command ended by itself
    TIMEOUT = "timeout"  # the wall time was over; the whole container was killed
    MEMORY = "memory"  # the kernel killed a process of the job at the memory limit
    OUTPUT_LIMIT = "output-limit"  # more output than allowed; the whole container was killed
    KILLED = "killed"  # ended by a signal, or the job killed the process that watches it
    REFUSED = "refused"  # the job's files cannot be laid out: too many, too deep, too large together; nothing ran
    INFRASTRUCTURE = "infrastructure"  # the engine or the image failed: says nothing about the job, never score it


#: Characters of a path, bytes of one name (what Linux takes), and names in a path.
MOST_PATH, MOST_NAME, MOST_FOLDERS = 1024, 255, 64


@dataclass(frozen=True)
class Limits:
    """What one job may use. The container has them from its start, so warm containers are kept per set of limits.

    Attributes:
        memory_mb: memory of all processes and of what lies in the work area, in MiB; there is no swap beyond it.
        cpus: processor time per wall time.
        pids: processes and threads together, three of the runner's own included.
        file_mb: size of one file, in MiB.
        work_mb: size of the work area, and of /tmp, in MiB each.
        output_kb: standard output and standard error together, in KiB.
        seconds: wall time of the command.
    """

    memory_mb: int = 512
    cpus: float = 1.0
    pids: int = 128
    file_mb: int = 64
    work_mb: int = 256
    output_kb: int = 256
    seconds: float = 60.0

    def __post_init__(self) -> None:
        low = {"memory_mb": 64, "cpus": 0.01, "pids": 8, "file_mb": 1, "work_mb": 1, "output_kb": 1, "seconds": 0.1}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UsageError(f"limit {name}: {getattr(self, name)} is below {least}", "Raise it.")


@dataclass(frozen=True)
class Job:
    """One command on a set of files.

    Attributes:
        files: path relative to the work area -> content; text is encoded as UTF-8.
        command: run in the work area as an unprivileged user; standard input is empty.
        read_back: files to hand back, relative to the work area; regular files only, no symlink is followed.
        environment: in addition to PATH, HOME, TMPDIR, LANG, PYTHONDONTWRITEBYTECODE and PYTHONHASHSEED.
        protected: those of `files` that the command can read, and neither change, replace nor remove.
        sealed: all files are protected, and nobody can make a file in the work area; /tmp stays writable.

    Raises:
        UsageError: a path leaves the work area, a protected file is not among the files, the command is empty.
    """

    files: dict[str, bytes | str]
    command: list[str]
    limits: Limits = field(default_factory=Limits)
    read_back: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    sealed: bool = False

    def __post_init__(self) -> None:
        for path in (*self.files, *self.read_back):
            check_path(path)
        for path in self.files:
            parent = next((str(p) for p in PurePosixPath(path).parents if str(p) in self.files), None)
            if parent:
                raise UsageError(f"sandbox file {path!r}: {parent!r} is a file too", "One path cannot be both.")
        missing = sorted(set(self.protected) - set(self.files))
        if missing:
            raise UsageError(f"protected {missing[0]!r} is not among the files of the job", "Add it to files.")
        if not self.command or any("\0" in part for part in self.command):
            raise UsageError(f"command {self.command!r}: not a command", "Give at least one word, without NUL.")
        for name, value in self.environment.items():
            if not name or "=" in name or "\0" in name + value:
                raise UsageError(f"environment variable {name!r}: not a name and value", "Leave out '=' and NUL.")
        size = sum(len(content) for content in self.files.values())
        if size > self.limits.work_mb * 2**20:
            raise UsageError(f"the job's files ({size} bytes) do not fit in the work area", "Raise work_mb.")


@dataclass(frozen=True)
class Result:
    """How the job ended.

    Attributes:
        exit_code: of the command, 128 + number if a signal ended it; None where the command did not end.
        output: standard output and standard error as they came, cut at the limit (`truncated`).
        seconds: wall time from handing the job over to its end.
        files: of `read_back`, those that exist, are regular files and are not too large.
        message: one line for people: what limit was met, what could not be read back, what failed.
    """

    kind: Kind
    exit_code: int | None
    output: str
    truncated: bool
    seconds: float
    files: dict[str, bytes]
    message: str = ""


def check_path(path: str) -> None:
    """Raises:
    UsageError: `path` is not a plain relative path below the work area, in its shortest form.
    """
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts) or len(path) > MOST_PATH:
        raise UsageError(f"sandbox path {path[:80]!r}: not a plain relative path", "Leave out '/', '.' and '..' parts.")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError as error:
        raise UsageError(f"sandbox path {path[:80]!r} is not UTF-8", "Rename the file.") from error
    if longest > MOST_NAME or len(parts) > MOST_FOLDERS:
        raise UsageError(f"sandbox path {path[:80]!r}: a name too long, or too many folders", "Shorten it.")


@dataclass(frozen=True)
class TestReport:
    """Outcomes of one test run.

    Attributes:
        kind: OK when the run came to its end under the eyes of the reporter; else outcomes are incomplete.
        outcomes: node id -> "passed", "failed", "error" or "skipped". A test that was asked for and has no proven
            outcome is an "error". Node ids are relative to the work area.
        seconds: wall time.
        message: one line for people.
        tampered: the code under test changed pytest, its hooks or its records; no "passed" is left in `outcomes`.
        failures: node id -> one line on why it did not pass.
        output: what the run wrote, for people only.
    """

    __test__ = False

    kind: Kind
    outcomes: dict[str, str]
    seconds: float
    message: str
    tampered: bool
    failures: dict[str, str] = field(default_factory=dict)
    output: str = ""


class Sandbox(Protocol):
    """Runs jobs in containers of one image, each in one of its own."""

    def run(self, job: Job) -> Result:
        """Run one job; never raises for what the job does."""
        ...

    def run_many(self, jobs: Iterable[Job], workers: int = 2) -> list[Result]:
        """Results in the order of the jobs."""
        ...

    def run_tests(
        self,
        files: dict[str, bytes | str],
        tests: Sequence[str] | None = None,
        limits: Limits | None = None,
        hidden: Sequence[str] = (),
    ) -> TestReport:
        """Run pytest on files, with outcomes that the code under test cannot write by itself.

        Args:
            files: path relative to the work area -> content: the package (at the top or in `src/`) and its tests; none
                of them can be changed by the run, and no other file can be made beside them.
            tests: files, folders or node ids; None collects what pytest finds.
            hidden: those of `files` that are Python modules and lie in the run as compiled code alone, harmlessly
                varied: what tests them cannot read them.

        Raises:
            UsageError: a path is not a plain relative path.
        """
        ...


class Sandboxes(Protocol):
    """Makes environments for jobs, and sandboxes of them."""

    def build(self, name: str, requirements: Sequence[str]) -> str:
        """The image of an environment with pinned packages ("name==version" each), made if need be; its tag.

        Raises:
            UsageError: a name or a requirement is not of its form.
            ServiceError: the engine fails.
        """
        ...

    def open(
        self, image: str, *, warm: int = 2, limits: Limits | None = None, preload: bool = True
    ) -> AbstractContextManager[Sandbox]:
        """A sandbox of an image; its containers are gone when the context ends.

        Args:
            warm: containers kept ready; 0 makes one when a job comes.
            limits: of the containers that are made ready before the first job.
            preload: import pytest in warm containers; for jobs that start a Python of their own it is wasted.

        Raises:
            ServiceError: no engine answers, or it does not have the image.
        """
        ...
