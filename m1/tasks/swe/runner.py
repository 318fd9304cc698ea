"""pytest runs of trees in the sandbox, with the probe beside them: what `validate` asks and what it gets back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from m1.errors import M1Error
from m1.tasks.sandbox import Job, Kind, Result
from m1.tasks.swe.reward import LIMITS
from m1.tasks.swe.sources import Package, Repository

_INSIDE = Path(__file__).parent / "inside"
_BATCH, _PROBE = ((_INSIDE / f"{name}.py").read_bytes() for name in ("m1_batch", "m1_probe"))
#: Seconds that a container may take beyond the limits of its runs.
SLACK = 60.0


class Runs(Protocol):
    """The part of a sandbox that is used here."""

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
        reverse: run the files of tests from the last to the first.
    """

    tree: Mapping[str, bytes]
    select: Sequence[str] | None = None
    seconds: float = 300.0
    seconds_per_test: float = 60.0
    stop_at_failure: bool = False
    failures: int = 0
    coverage: bool = False
    reverse: bool = False


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


def job_of(origin: Package | Repository, requests: Sequence[Request]) -> Job:
    """The sandbox job of some runs, one after the other, each on a fresh copy of its tree."""
    base = requests[0].tree
    files: dict[str, bytes | str] = {f"m1_base/{path}": content for path, content in base.items()}
    runs = []
    for request in requests:
        changed: dict[str, int | None] = {path: None for path in base if path not in request.tree}
        for path, content in request.tree.items():
            if base.get(path) != content:
                changed[path] = len(files)
                files[f"m1_changed/{len(files)}"] = content
        runs.append({"changed": changed, **_run_of(origin, request)})
    files |= {"m1_batch.py": _BATCH, "m1_probe.py": _PROBE, "m1_batch.json": json.dumps(runs)}
    return Job(
        files=files,
        command=["python3", "m1_batch.py"],
        limits=replace(LIMITS, seconds=SLACK + sum(request.seconds for request in requests)),
        read_back=tuple(map(_answer, range(len(requests)))),
        environment={"PYTHONHASHSEED": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


def _answer(number: int) -> str:
    return f"m1_result_{number}.json"


def _run_of(origin: Package | Repository, request: Request) -> dict[str, Any]:
    """A run as `inside/m1_batch.py` reads it. With a selection, only files that hold selected tests are collected."""
    asked = {
        "select": None if request.select is None else list(request.select),
        "seconds_per_test": request.seconds_per_test,
        "failures": request.failures,
        "reverse": request.reverse,
        "coverage": [f"{place.rstrip('/')}/*" if not place.endswith(".py") else place for place in origin.code]
        if request.coverage
        else [],
    }
    places = origin.tests if request.select is None else sorted({test.partition("::")[0] for test in request.select})
    # As in infra.sandbox.pytest_run, which judges answers: no settings of the project, no conftest files, no plugins.
    arguments = [
        "-q", "--no-header", "--tb=no", "-c", "/dev/null", "--rootdir", ".", "--noconftest",
        "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "m1_probe",
        "--continue-on-collection-errors", *(f"--deselect={test}" for test in origin.deselect),
        *(["-x"] if request.stop_at_failure else []), *places,
    ]  # fmt: skip
    path = ["."] if origin.import_root == "." else [origin.import_root, "."]
    return {"asked": asked, "arguments": arguments, "path": path, "seconds": request.seconds}


def read_result(raw: bytes) -> Report:
    """Make a report of what a run has left."""
    try:
        answer = json.loads(raw)
    except ValueError:
        return Report("crash", message="its result is not JSON")
    if "ended" in answer:
        return Report(answer["ended"], message=answer["output"])
    end = "hung" if answer["hung"] else "collection" if answer["collection_errors"] else "done"
    errors = "\n".join(f"{name}\n{text}" for name, text in answer["collection_errors"])
    return Report(
        end, answer["outcomes"], answer["seconds"], answer["failures"], answer["lines"], errors or answer["hung"] or ""
    )


def run(sandbox: Runs, origin: Package | Repository, requests: Sequence[Request], workers: int) -> list[Report]:
    """Reports in the order of the requests, which share as many containers as there are workers.

    Runs whose container came to an end before them are done again, each in a container of its own.

    Raises:
        M1Error: the sandbox itself failed, twice; that says nothing of the trees.
    """
    if not requests:
        return []
    reports = _together(sandbox, origin, requests, -(-len(requests) // workers), workers)
    left = [at for at, report in enumerate(reports) if report is None]
    alone = _together(sandbox, origin, [requests[at] for at in left], 1, workers)
    found = dict(zip(left, alone, strict=True))
    return [report or found[at] or Report("crash") for at, report in enumerate(reports)]


def _together(
    sandbox: Runs, origin: Package | Repository, requests: Sequence[Request], size: int, workers: int
) -> list[Report | None]:
    """Run the requests, `size` of them to a container; None where that ended before the run did."""
    batches = [requests[at : at + size] for at in range(0, len(requests), size)]
    jobs = [job_of(origin, batch) for batch in batches]
    results = list(sandbox.run_many(jobs, workers=workers)) if jobs else []
    again = [at for at, result in enumerate(results) if result.kind is Kind.INFRASTRUCTURE]
    if again:
        for at, result in zip(again, sandbox.run_many([jobs[at] for at in again], workers=1), strict=True):
            results[at] = result
    reports: list[Report | None] = []
    for batch, result in zip(batches, results, strict=True):
        if result.kind is Kind.INFRASTRUCTURE:
            raise M1Error(f"the sandbox failed: {result.message}", "Check the engine, then run it again: it continues.")
        for number in range(len(batch)):
            raw = result.files.get(_answer(number))
            reports.append(None if raw is None else read_result(raw))
    return reports
