"""Which faults make tasks: found out by running the tests in the sandbox, never by assumption.

How often what is run, per tree:

- The right tree: the whole suite twice, the second time with its files in reverse order; a test counts as reliable
  if it passes both times. Once more with coverage, for the map from lines to the tests that run them (packages only).
- A faulty tree: the tests that run the faulty lines, up to the first failure; where one fails, the whole suite; where
  that leaves at least half of the reliable tests, the failing ones once more. `fail_to_pass` are those that failed
  both times; a test that failed once only is dropped from the task.
- The gold tree is compared byte for byte with the right tree, whose two runs then are the gold patch's own: every test
  of `fail_to_pass` passed in both, and so did every other reliable test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from m1.errors import UsageError
from m1.tasks.swe.patches import Tree, apply_diff, make_diff
from m1.tasks.swe.runner import Report, Request, Runs, run
from m1.tasks.swe.sources import Package, Repository

#: A test that passes on the right tree in this time and takes longer on a faulty one hangs.
SECONDS_PER_TEST = 8.0
SUITE_SECONDS = 120.0
#: Of the reliable tests, at least this share must still pass on the faulty tree.
LEAST_PASSING = 0.5


@dataclass(frozen=True)
class Baseline:
    """What the right tree does: reliable tests, unreliable ones, and by file and line the tests that run it."""

    reliable: tuple[str, ...]
    unreliable: tuple[str, ...]
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def covering(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[str] | None:
        """Reliable tests that run one of the lines; None (all of them) if a line is also run at import time."""
        lines = self.lines.get(path, {})
        names = {test for line, tests in lines.items() if any(a <= int(line) <= b for a, b in ranges) for test in tests}
        return None if "" in names else sorted(names & set(self.reliable))


@dataclass(frozen=True)
class Verdict:
    """Whether a faulty tree makes a task; `reason` is `valid` or why not."""

    reason: str
    fail_to_pass: tuple[str, ...] = ()
    unreliable: tuple[str, ...] = ()
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.reason == "valid"


#: Every reason a candidate falls out for, in the order in which they are looked for.
REASONS = {
    "not reached": "no reliable test runs the faulty lines",
    "survives": "every test passes on it",
    "unread": "the commit cannot be read",
    "collection": "the tests cannot be collected",
    "hangs": "a test goes over its time",
    "dies": "the run ends early: memory, time, crash",
    "breaks most": "fewer than half of the reliable tests pass",
    "flaky": "no test fails twice",
    "gold": "the gold patch does not lead back to the right tree",
    "leaks": "the issue text cannot be written without lines of the patch",
}


def measure(sandbox: Runs, origin: Package | Repository, tree: Tree, workers: int, *, coverage: bool) -> Baseline:
    """Run the right tree's suite twice, and once more for coverage if asked.

    Raises:
        UsageError: the suite does not run to its end, or no test passes twice.
    """
    plain = Request(tree, seconds=SUITE_SECONDS, seconds_per_test=SECONDS_PER_TEST)
    reports = run(sandbox, origin, [plain, replace(plain, reverse=True)], workers)
    for report in reports:
        if report.end not in ("done", "collection"):
            raise UsageError(
                f"{origin.name}: its tests end with {report.end}: {report.message[-300:]}",
                "Correct tests, deselect or the environment in the spec.",
            )
    reliable = reports[0].passed & reports[1].passed
    if not reliable:
        raise UsageError(
            f"{origin.name}: no test passes twice: {reports[0].message[-300:]}",
            "Correct tests, import_root or the environment in the spec.",
        )
    unreliable = (set(reports[0].outcomes) | set(reports[1].outcomes)) - reliable
    lines: dict[str, dict[str, list[str]]] = {}
    if coverage:
        traced = Request(tree, seconds=2 * SUITE_SECONDS, seconds_per_test=SUITE_SECONDS, coverage=True)
        [report] = run(sandbox, origin, [traced], workers)
        lines = report.lines
        if not lines:
            raise UsageError(
                f"{origin.name}: no line of its code was run ({report.end} {report.message[-300:]})",
                "Add coverage to the environment's requirements; correct code and import_root in the spec.",
            )
    return Baseline(tuple(sorted(reliable)), tuple(sorted(unreliable)), lines)


@dataclass(frozen=True)
class Trial:
    """A faulty tree to judge; `covering`: the tests to try first, None for all, empty if no test reaches the fault."""

    faulty: Tree
    covering: Sequence[str] | None


def judge(
    sandbox: Runs, origin: Package | Repository, baseline: Baseline, trials: Sequence[Trial], workers: int
) -> list[Verdict]:
    """Verdicts in the order of the trials; see the head of this module for what is run."""
    verdicts: dict[int, Verdict] = {}

    def ask(numbers: Sequence[int], requests: Sequence[Request]) -> list[tuple[int, Report]]:
        reports = run(sandbox, origin, requests, workers)
        going = []
        for number, report in zip(numbers, reports, strict=True):
            if (reason := _ended_early(report)) is not None:
                verdicts[number] = Verdict(reason)
            else:
                going.append((number, report))
        return going

    reliable = set(baseline.reliable)
    numbers = []
    for number, trial in enumerate(trials):
        if trial.covering is not None and not trial.covering:
            verdicts[number] = Verdict("not reached")
        else:
            numbers.append(number)
    first = [
        _request(trials[n].faulty, sorted(reliable) if (chosen := trials[n].covering) is None else chosen, stop=True)
        for n in numbers
    ]
    numbers = []
    for number, report in ask([n for n in range(len(trials)) if n not in verdicts], first):
        if report.failed & reliable:
            numbers.append(number)
        else:
            verdicts[number] = Verdict("survives")
    failing: dict[int, list[str]] = {}
    for number, report in ask(numbers, [_request(trials[n].faulty, baseline.reliable) for n in numbers]):
        if len(report.passed & reliable) < LEAST_PASSING * len(reliable):
            verdicts[number] = Verdict("breaks most")
        else:
            failing[number] = sorted(reliable - report.passed)
    again = [_request(trials[n].faulty, failing[n], failures=8) for n in failing]
    for number, report in ask(list(failing), again):
        twice = tuple(test for test in failing[number] if test not in report.passed)
        seen = {test: report.failures[test] for test in twice if test in report.failures}
        once = tuple(test for test in failing[number] if test in report.passed)
        verdicts[number] = Verdict("valid", twice, once, seen) if twice and seen else Verdict("flaky")
    return [verdicts[number] for number in range(len(trials))]


def _request(tree: Tree, select: Sequence[str], *, stop: bool = False, failures: int = 0) -> Request:
    return Request(
        tree, select=select, seconds=SUITE_SECONDS, seconds_per_test=SECONDS_PER_TEST, stop_at_failure=stop,
        failures=failures,
    )  # fmt: skip


def _ended_early(report: Report) -> str | None:
    if report.end == "done":
        return None
    return {"hung": "hangs", "collection": "collection"}.get(report.end, "dies")


def patches_between(right: Mapping[str, bytes], faulty: Mapping[str, bytes]) -> tuple[str, str] | None:
    """(setup, gold): from right to faulty and back; None if applying them does not give the very same bytes."""
    setup, gold = make_diff(right, faulty), make_diff(faulty, right)
    exact = apply_diff(right, setup) == dict(faulty) and apply_diff(faulty, gold) == dict(right)
    return (setup, gold) if exact else None
