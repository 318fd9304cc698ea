"""One pytest run of a tree in the sandbox, with the probe beside it: what `validate` asks and what it gets back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from infra.sandbox import Job, Kind, Result
from m1.errors import M1Error
from stages.swe.reward import LIMITS
from stages.swe.sources import Package, Repository

_PROBE = (Path(__file__).parent / "inside" / "m1_probe.py").read_bytes()
_ASKED, _ANSWER = "m1_probe.json", "m1_result.json"


class Runs(Protocol):
    """The part of `infra.sandbox.Sandbox` that is used here."""

    def run_many(self, jobs: Sequence[Job], workers: int = 2) -> list[Result]: ...


@dataclass(frozen=True)
class Request:
    """A run: which tests (None: all), and what to measure beside the outcomes.

    Attributes:
        seconds: limit of the whole run.
        seconds_per_test: a test that takes longer ends the run.
        stop_at_failure: end with the first failure.
        failures: of how many failing tests the exception and its frames are wanted.
        coverage: measure which test runs which line of the source's code.
    """

    tree: Mapping[str, bytes]
    select: Sequence[str] | None = None
    seconds: float = 300.0
    seconds_per_test: float = 60.0
    stop_at_failure: bool = False
    failures: int = 0
    coverage: bool = False


@dataclass(frozen=True)
class Report:
    """What came back.

    Attributes:
        end: `done`, `hung` (a test went over its time), `timeout`, `memory`, `crash` or `collection`.
        outcomes: by test id: passed, failed, error, skipped or xfailed.
        failures: by test id, as `inside/m1_probe.py` writes them.
        lines: by file and line, the tests that run it; "" stands for import time.
    """

    end: str
    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    message: str = ""

    @property
    def passed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}

    @property
    def failed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome in ("failed", "error")}


def job_of(origin: Package | Repository, request: Request) -> Job:
    """The sandbox job of a run. With a selection, only the files that hold selected tests are collected."""
    asked = {
        "select": None if request.select is None else list(request.select),
        "seconds_per_test": request.seconds_per_test,
        "failures": request.failures,
        "coverage": [f"{place.rstrip('/')}/*" if not place.endswith(".py") else place for place in origin.code]
        if request.coverage
        else [],
    }
    places = origin.tests if request.select is None else sorted({test.partition("::")[0] for test in request.select})
    # As in infra.sandbox.pytest_run, which judges answers: no settings of the project, no conftest files, no plugins.
    command = [
        "python3", "-m", "pytest", "-q", "--no-header", "--tb=no", "-c", "/dev/null", "--rootdir", ".", "--noconftest",
        "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "m1_probe",
        "--continue-on-collection-errors", *(f"--deselect={test}" for test in origin.deselect),
        *(["-x"] if request.stop_at_failure else []), *places,
    ]  # fmt: skip
    limits = replace(LIMITS, seconds=request.seconds)
    files: dict[str, bytes | str] = {**request.tree, "m1_probe.py": _PROBE, _ASKED: json.dumps(asked)}
    root = "." if origin.import_root == "." else f"{origin.import_root}:."
    environment = {"PYTHONPATH": root, "PYTHONHASHSEED": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Job(files=files, command=command, limits=limits, read_back=(_ANSWER,), environment=environment)


def read_result(result: Result) -> Report:
    """Make a report of a sandbox result.

    Raises:
        M1Error: the sandbox itself failed; that says nothing of the tree.
    """
    if result.kind is Kind.INFRASTRUCTURE:
        raise M1Error(f"the sandbox failed: {result.message}", "Check the engine, then run it again: it continues.")
    raw = result.files.get(_ANSWER)
    tail = result.output[-2000:]
    if raw is None:
        ends = {Kind.TIMEOUT: "timeout", Kind.MEMORY: "memory"}
        return Report(ends.get(result.kind, "crash"), message=tail)
    try:
        answer = json.loads(raw)
    except ValueError:
        return Report("crash", message=tail)
    end = "hung" if answer["hung"] else "collection" if answer["collection_errors"] else "done"
    errors = "\n".join(f"{name}\n{text}" for name, text in answer["collection_errors"])
    return Report(
        end, answer["outcomes"], answer["seconds"], answer["failures"], answer["lines"], errors or answer["hung"] or ""
    )


def run(sandbox: Runs, origin: Package | Repository, requests: Sequence[Request], workers: int) -> list[Report]:
    """Reports in the order of the requests; a job that the sandbox failed on is tried once more.

    Raises:
        M1Error: the sandbox failed twice.
    """
    jobs = [job_of(origin, request) for request in requests]
    results = list(sandbox.run_many(jobs, workers=workers)) if jobs else []
    again = [at for at, result in enumerate(results) if result.kind is Kind.INFRASTRUCTURE]
    if again:
        for at, result in zip(again, sandbox.run_many([jobs[at] for at in again], workers=1), strict=True):
            results[at] = result
    return [read_result(result) for result in results]
