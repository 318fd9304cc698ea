"""One container, used for one job.

Its first process is the keeper, under a user of its own; the launcher comes by `exec` under the job's user. Both are
started and ready before the job is there, so that a warm container costs the job nothing.
"""

from __future__ import annotations

import functools
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker.types

from infra.sandbox import engine
from infra.sandbox.stream import MESSAGES, OUTPUT, Gone, Nonsense, Stream
from m1.errors import ServiceError
from m1.tasks.sandbox import Job, Kind, Limits, Result

WORK = "/work"
#: The keeper's user and the job's; neither has a capability.
KEEPER_USER, JOB_USER = "1001:1001", "1000:1000"
#: Where an image has the compiled files of its own Python sources, as Python lays them out below a cache prefix. The
#: root is read-only: compiled files from elsewhere are not looked for, and cannot stand in for a source.
COMPILED = "/opt/m1-compiled"
#: Seconds for what only our own programs do: starting, laying in files, accounting.
PATIENCE = 120.0
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPYCACHEPREFIX": COMPILED,
    # Names of tests may depend on it (parameters out of a set), and a test must be found again by its name.
    "PYTHONHASHSEED": "0",
}
_PYTHON = ["python3", "-P", "-s"]  # as -I, but for the variables above


class Unusable(Exception):
    """The container could not be made, or failed before the job's command began."""


class Refused(Exception):
    """The job's files cannot be laid out; another container would not take them either."""


@dataclass
class Ended:
    """How the job ended, and the messages of its test run."""

    result: Result
    messages: list[dict[str, Any]] = field(default_factory=list)
    nonsense: bool = False


class Container:
    """A container with keeper and launcher waiting.

    Args:
        tests: import pytest before the job comes.

    Raises:
        Unusable: the engine could not make it.
    """

    def __init__(self, image: str, runtime: str | None, limits: Limits, tests: bool) -> None:
        self.limits = limits
        self.id = ""
        self._keeper: Stream | None = None
        self._launcher: Stream | None = None
        try:
            self._start(image, runtime, tests)
        except (*engine.FAULTS, ServiceError, Gone, Nonsense, TimeoutError) as error:
            self.remove()
            raise Unusable(f"no container of {image}: {_one_line(error)}") from error

    def _start(self, image: str, runtime: str | None, tests: bool) -> None:
        api = engine.client()
        keeper, launcher, test_run = _programs()
        self.id = api.create_container(
            image,
            [*_PYTHON, "-S", "-c", keeper],
            entrypoint=[],
            name=f"m1-sandbox-{secrets.token_hex(6)}",
            user=KEEPER_USER,
            stdin_open=True,
            working_dir="/",
            environment=ENVIRONMENT,
            labels={engine.LABEL: "job", engine.OWNER: engine.owner()},
            host_config=_host_config(runtime, self.limits),
        )["Id"]
        attached = api.attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stream": 1})
        self._keeper = Stream(attached, messages=OUTPUT, most=0)
        api.start(self.id)
        command = [*_PYTHON, "-c", launcher, test_run, "1" if tests else "0"]
        made = api.exec_create(self.id, command, stdin=True, user=JOB_USER, workdir="/", environment=ENVIRONMENT)
        most = 5 * self.limits.file_mb * 2**20
        self._launcher = Stream(api.exec_start(made["Id"], socket=True), messages=MESSAGES, most=most)
        # Both are silent until they are spoken to: what came with the engine's own answer would be lost.
        for stream in (self._keeper, self._launcher):
            stream.send({"what": "ping"}, PATIENCE)
            stream.receive(time.monotonic() + PATIENCE, 0)

    def run(self, job: Job, tests: dict[str, Any] | None = None) -> Ended:
        """Run the job, or a test run in its place; the container is of no use afterwards.

        Raises:
            Unusable: it failed before the command began.
        """
        try:
            self._lay(job, tests)
        except Refused as error:
            return Ended(Result(Kind.REFUSED, None, "", False, 0.0, {}, _one_line(error)))
        except (Gone, Nonsense, TimeoutError) as error:
            raise Unusable(f"the container ended before the job began: {_one_line(error)}") from error
        started = time.monotonic()
        watch = _Watch(self, job, started)
        kind, message = watch.follow()
        seconds = time.monotonic() - started
        if not watch.killed:
            kind, message = self._account(kind, message)
        output, truncated = watch.output()
        exit_code = watch.exit_code if kind in (Kind.OK, Kind.MEMORY, Kind.KILLED) else None
        result = Result(kind, exit_code, output, truncated, seconds, watch.files, message)
        return Ended(result, watch.messages, watch.nonsense)

    def _lay(self, job: Job, tests: dict[str, Any] | None) -> None:
        assert self._keeper is not None and self._launcher is not None
        files = {path: c.encode() if isinstance(c, str) else bytes(c) for path, c in job.files.items()}
        protected = set(files) if job.sealed else set(job.protected)
        mine = {path: content for path, content in files.items() if path not in protected}
        kept = {path: content for path, content in files.items() if path in protected}
        if kept or job.sealed:
            _ask(self._keeper, {"what": "lay", "files": _sizes(kept), "sealed": job.sealed}, list(kept.values()))
        head = {
            "what": "run",
            "files": _sizes(mine),
            "command": job.command,
            "environment": ENVIRONMENT | job.environment,
            "read_back": list(job.read_back),
            "most": job.limits.file_mb * 2**20,
            "tests": tests,
        }
        _ask(self._launcher, head, list(mine.values()))

    def _account(self, kind: Kind, message: str) -> tuple[Kind, str]:
        """What the keeper says of the limits; without an answer the container itself has ended."""
        assert self._keeper is not None
        try:
            spent = _ask(self._keeper, {"what": "account"}, [])
        except (Refused, Gone, Nonsense, TimeoutError):
            return self._post_mortem()
        if spent["memory"]:
            return Kind.MEMORY, f"a process was killed at the memory limit of {self.limits.memory_mb} MiB"
        if spent["full"]:
            message = f"{message}; " * bool(message) + f"the work area of {self.limits.work_mb} MiB is full"
        if spent["pids"]:
            message = f"{message}; " * bool(message) + f"the limit of {self.limits.pids} processes was met"
        return kind, message

    def _post_mortem(self) -> tuple[Kind, str]:
        try:
            state = engine.client().inspect_container(self.id)["State"]
        except (*engine.FAULTS, ServiceError) as error:
            return Kind.INFRASTRUCTURE, f"the container has gone: {_one_line(error)}"
        if state.get("OOMKilled"):
            return Kind.MEMORY, f"killed at the memory limit of {self.limits.memory_mb} MiB"
        return Kind.INFRASTRUCTURE, f"the container ended from outside (status {state.get('Status')})"

    def remove(self) -> None:
        """Kill everything in it and remove it.

        Raises:
            ServiceError: the engine could not do it.
        """
        for stream in (self._keeper, self._launcher):
            if stream is not None:
                stream.close()
        if self.id:
            engine.remove(self.id)


class _Watch:
    """Follows one job to its end."""

    def __init__(self, container: Container, job: Job, started: float) -> None:
        assert container._launcher is not None
        self._container, self._stream, self._limits = container, container._launcher, job.limits
        self._deadline = started + job.limits.seconds
        self._most, self._read_back = job.limits.output_kb * 1024, job.read_back
        self.messages: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.files: dict[str, bytes] = {}
        self.nonsense = self.killed = False

    def follow(self) -> tuple[Kind, str]:
        size = 0
        try:
            while (message := self._stream.receive(self._deadline, self._most)) is not None:
                head, payload = message
                if "exit" in head:
                    return self._end(head, payload)
                size += len(str(head))
                if size > self._container.limits.work_mb * 2**20:
                    return self._kill(Kind.OUTPUT_LIMIT, "endless records of a test run")
                self.messages.append(head)
            return self._kill(Kind.OUTPUT_LIMIT, f"more than {self._limits.output_kb} KiB of output")
        except TimeoutError:
            return self._kill(Kind.TIMEOUT, f"not finished after {self._limits.seconds:g} s")
        except Gone:
            return Kind.KILLED, "the job killed the process that watched it"
        except Nonsense as error:
            self.nonsense = True
            return self._kill(Kind.KILLED, f"the line to the runner carried {error}")

    def _end(self, head: dict[str, Any], payload: bytes) -> tuple[Kind, str]:
        try:
            code, position = int(head["exit"]), 0
            for path, size in head["files"]:
                if path in self._read_back:
                    self.files[path] = payload[position : position + size]
                position += size
            unread = "; ".join(f"{path}: {reason}" for path, reason in head["unread"].items())
        except (KeyError, TypeError, ValueError, AttributeError):
            self.nonsense = True
            return Kind.KILLED, "the record of the end is broken"
        self._stream.drain(time.monotonic() + 5, self._most)
        self.exit_code = code if code >= 0 else 128 - code
        if len(self._stream.output) > self._most:
            return Kind.OUTPUT_LIMIT, f"more than {self._limits.output_kb} KiB of output"
        if code < 0:
            return Kind.KILLED, f"ended by signal {-code}" + f"; {unread}" * bool(unread)
        return Kind.OK, unread

    def _kill(self, kind: Kind, message: str) -> tuple[Kind, str]:
        self.killed = True
        try:
            self._container.remove()
        except ServiceError as error:
            message = f"{message}; {error}"
        return kind, message

    def output(self) -> tuple[str, bool]:
        raw = self._stream.output
        return raw[: self._most].decode(errors="replace"), len(raw) > self._most


def _ask(stream: Stream, head: dict[str, Any], contents: list[bytes]) -> dict[str, Any]:
    stream.send(head, PATIENCE, contents)
    answer = stream.receive(time.monotonic() + PATIENCE, 0)
    if answer is None:
        raise Nonsense("output in place of an answer")
    if "error" in answer[0]:
        raise Refused(f"the job's files cannot be laid out: {answer[0]['error']}")
    return answer[0]


def _sizes(files: dict[str, bytes]) -> list[tuple[str, int]]:
    return [(path, len(content)) for path, content in files.items()]


@functools.cache
def _programs() -> tuple[str, str, str]:
    """Sources of keeper, launcher and test run."""
    folder = Path(__file__).parent / "inside"
    wire, keeper, launcher, tests = (
        (folder / f"{name}.py").read_text(encoding="utf-8") for name in ("wire", "keeper", "launcher", "tests")
    )
    return f"{wire}\n{keeper}", f"{wire}\n{launcher}", tests


@functools.cache
def _seccomp() -> str:
    """Which system calls a job may make: those of ordinary programs. All others are refused, also ones yet to come.

    Docker's own filter differs from version to version, and has had io_uring and sockets to the hypervisor open.
    """
    return (Path(__file__).parent / "inside" / "seccomp.json").read_text(encoding="utf-8")


#: Runtimes with a kernel of their own inside, which filter for themselves what reaches the host.
_FILTER_THEMSELVES = ("runsc", "gvisor")


def _security(runtime: str | None) -> list[str]:
    own = (runtime or "").startswith(_FILTER_THEMSELVES)
    return ["no-new-privileges:true", *([] if own else [f"seccomp={_seccomp()}"])]


def _host_config(runtime: str | None, limits: Limits) -> Any:
    """The settings that isolate the container."""
    area = f"rw,exec,nosuid,nodev,size={limits.work_mb}m,nr_inodes=65536,mode=1777,uid=1001,gid=1001"
    file_size = limits.file_mb * 2**20
    return engine.client().create_host_config(
        network_mode="none",
        read_only=True,
        tmpfs={WORK: area, "/tmp": area},
        shm_size="16m",
        cap_drop=["ALL"],
        security_opt=_security(runtime),
        privileged=False,
        ipc_mode="private",
        mem_limit=limits.memory_mb * 2**20,
        memswap_limit=limits.memory_mb * 2**20,
        cpu_period=100_000,
        cpu_quota=int(limits.cpus * 100_000),
        pids_limit=limits.pids,
        ulimits=[
            docker.types.Ulimit(name="fsize", soft=file_size, hard=file_size),
            docker.types.Ulimit(name="nofile", soft=1024, hard=1024),
            docker.types.Ulimit(name="core", soft=0, hard=0),
        ],
        log_config=docker.types.LogConfig(type="none"),
        restart_policy={"Name": "no"},
        runtime=runtime,
    )


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
