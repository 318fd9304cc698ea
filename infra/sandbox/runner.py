"""The runner: a pool of warm containers, each used for one job."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import docker.errors

from infra.sandbox import engine, pytest_run
from infra.sandbox.container import Container, Ended, Unusable
from m1.errors import ServiceError, UsageError
from m1.tasks.sandbox import Job, Kind, Limits, Result, TestReport

#: Label of an image: its packages, "name==version" each.
PACKAGES = "m1.sandbox.packages"
#: A job that the infrastructure has failed is given one more container.
TRIES = 2


class Sandbox:
    """Runs jobs in containers of one image.

    Args:
        image: tag as `m1 sandbox images` lists it, for example "m1-swe-python".
        runtime: runtime class of the engine (runsc, kata, ...); None for the engine's own default.
        warm: containers kept ready; 0 makes one when a job comes.
        limits: of the containers that are made ready before the first job.
        preload: import pytest in warm containers; for jobs that start a Python of their own it is wasted.

    Raises:
        ServiceError: no engine answers, or it does not have the image or the runtime.
    """

    def __init__(
        self, image: str, runtime: str | None = None, warm: int = 2, limits: Limits | None = None, preload: bool = True
    ) -> None:
        if warm < 0:
            raise UsageError(f"warm={warm}: the number of warm containers cannot be negative", "Give 0 or more.")
        tests = _check(image, runtime) and preload
        engine.reap()
        self._pool = _Pool(image, runtime, warm, tests, limits or Limits())
        atexit.register(self.close)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all containers of this sandbox. A job that another thread still runs ends without a result."""
        atexit.unregister(self.close)
        self._pool.close()

    def run(self, job: Job) -> Result:
        """Run one job; never raises for what the job does.

        Raises:
            UsageError: the sandbox is closed.
        """
        return self.attempt(job).result

    def run_many(self, jobs: Iterable[Job], workers: int = 2) -> list[Result]:
        """Results in the order of the jobs."""
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(self.run, jobs))

    def run_tests(
        self,
        files: dict[str, bytes | str],
        tests: Sequence[str] | None = None,
        limits: Limits | None = None,
        hidden: Sequence[str] = (),
    ) -> TestReport:
        """Run pytest on files; see `pytest_run.run_tests`."""
        return pytest_run.run_tests(self, files, tests, limits, hidden)

    def attempt(self, job: Job, tests: dict[str, Any] | None = None) -> Ended:
        """Run a job, or the test run `tests` in its place (see `pytest_run`), and keep its messages."""
        reason = ""
        for _ in range(TRIES):
            container = None
            try:
                container = self._pool.take(job.limits)
                ended = container.run(job, None if tests is None else dict(tests))
            except Unusable as error:
                reason = str(error)
                continue
            finally:
                if container is not None:
                    self._pool.discard(container)
            if ended.result.kind is not Kind.INFRASTRUCTURE:
                return ended
            reason = ended.result.message
        return Ended(Result(Kind.INFRASTRUCTURE, None, "", False, 0.0, {}, reason))


class _Pool:
    """Warm containers for the limits that were asked for last."""

    def __init__(self, image: str, runtime: str | None, warm: int, tests: bool, limits: Limits) -> None:
        self._make = lambda limits: Container(image, runtime, limits, tests)
        self._warm, self._limits = warm, _shape(limits)
        self._ready: list[Container] = []
        self._taken: list[Container] = []
        self._making, self._closed = 0, False
        self._change = threading.Condition()
        self._removal = ThreadPoolExecutor(2, thread_name_prefix="sandbox-removal")
        self._fillers = [threading.Thread(target=self._fill, daemon=True) for _ in range(min(warm, 2))]
        for thread in self._fillers:
            thread.start()

    def take(self, limits: Limits) -> Container:
        """A container with these limits, for good.

        Raises:
            Unusable, UsageError
        """
        shape = _shape(limits)
        with self._change:
            if self._closed:
                raise UsageError("the sandbox is closed", "Open a new one.")
            if shape != self._limits:
                self._limits = shape
                for container in self._ready:
                    self.discard(container)
                self._ready.clear()
            found = self._ready.pop(0) if self._ready else None
            self._change.notify_all()
        taken = found or self._make(shape)
        with self._change:
            self._taken.append(taken)
            closed = self._closed
        if closed:
            self.discard(taken)
            raise UsageError("the sandbox was closed", "Open a new one.")
        return taken

    def discard(self, container: Container) -> None:
        """Remove a container without waiting for it."""
        with self._change:
            if container in self._taken:
                self._taken.remove(container)
        try:
            self._removal.submit(_remove, container)
        except RuntimeError:  # the interpreter is ending, or the pool is closed
            _remove(container)

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._fillers:
            thread.join()
        for container in self._ready:
            self.discard(container)
        self._ready.clear()
        with self._change:
            running = list(self._taken)
        for container in running:  # ends the job; the thread that runs it is told by its broken line
            with contextlib.suppress(ServiceError):
                engine.remove(container.id)
        self._removal.shutdown(wait=True)

    def _fill(self) -> None:
        while True:
            with self._change:
                while not self._closed and len(self._ready) + self._making >= self._warm:
                    self._change.wait()
                if self._closed:
                    return
                self._making += 1
                shape = self._limits
            made = None
            with contextlib.suppress(Unusable):  # the job that needs one tries by itself and tells why
                made = self._make(shape)
            with self._change:
                self._making -= 1
                if made is None:
                    self._change.wait(1.0)
                elif shape == self._limits and not self._closed:
                    self._ready.append(made)
                else:
                    self.discard(made)


def _shape(limits: Limits) -> Limits:
    """The limits that a container has from its start; the others are the runner's own affair."""
    return replace(limits, seconds=Limits.seconds, output_kb=Limits.output_kb)


def _remove(container: Container) -> None:
    with contextlib.suppress(ServiceError):  # carries our label: the next start of a sandbox removes it
        container.remove()


def _check(image: str, runtime: str | None) -> bool:
    """Whether the image has pytest.

    Raises:
        ServiceError: the engine does not have the image or the runtime.
    """
    try:
        found = engine.client().inspect_image(image)
    except docker.errors.ImageNotFound as error:
        raise ServiceError(f"the engine has no image {image!r}", "Build it with `m1 sandbox build`.") from error
    except engine.FAULTS as error:
        raise ServiceError(f"the engine does not tell about image {image!r}: {error}", engine.HOW_TO_GET_ONE) from error
    if runtime is not None and runtime not in (known := engine.describe()["runtimes"]):
        raise ServiceError(f"the engine has no runtime {runtime!r}", f"It has {', '.join(known)}.")
    packages = ((found.get("Config") or {}).get("Labels") or {}).get(PACKAGES, "")
    return any(package.startswith("pytest==") for package in packages.split())
