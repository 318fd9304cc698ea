"""What a launcher must do. Local processes are one launcher; a cluster's scheduler would be another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """One execution of a command, on one or several processes.

    Attributes:
        name: for people, such as "stage sft".
        command: what each node runs; it starts the processes of that node itself.
        environment: all of it.
        log: file to which everything the job prints is appended.
        grace: seconds from the request to stop to the moment the job is killed.
        lock: descriptor that every process of the job keeps open, so that the right to its run folder lasts as long as
            the last of them; None where no such right is held.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    grace: float
    lock: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        returncode: exit code, or minus the signal's number.
        lines: the last lines it printed.
        seconds: wall time from its start to its end.
    """

    returncode: int
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    seconds: float = 0.0


class Handle(Protocol):
    """A job that was submitted."""

    @property
    def identity(self) -> str:
        """What the launcher calls the job: a process id, the number of a scheduler."""
        ...


class Launcher(Protocol):
    """Runs jobs somewhere."""

    def submit(self, job: Job) -> Handle:
        """Start the job, or hand it to whoever will start it.

        Raises:
            ServiceError: it cannot be started.
        """
        ...

    def follow(self, handle: Handle, on_line: Callable[[str], None], on_tick: Callable[[], None]) -> Outcome:
        """Wait until the job has ended.

        Args:
            on_line: called with every line the job prints.
            on_tick: called about once a second.

        What `on_line` and `on_tick` raise reaches the caller, who then stops the job.
        """
        ...

    def stop(self, handle: Handle) -> None:
        """End the job in good order: it is asked to stop, given its grace, then killed. Nothing of it is left."""
        ...

    def reattach(self, job: Job, identity: str) -> Handle | None:
        """A job that an earlier process has submitted and that still runs, or None."""
        ...
