"""Test runs whose outcomes the code under test cannot write by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from infra.sandbox.job import Kind, Limits
from infra.sandbox.runner import Sandbox


@dataclass(frozen=True)
class TestReport:
    """Outcomes of one test run.

    Attributes:
        kind: OK when the run came to its end under the eyes of the reporter; else outcomes are incomplete.
        outcomes: node id -> "passed", "failed", "error" or "skipped". A test that was asked for and has no proven
            outcome is an "error". Node ids are relative to the work area.
        failures: node id -> one line on why it did not pass.
        seconds: wall time.
        message: one line for people.
        tampered: the code under test changed pytest, its hooks or its records; no "passed" is left in `outcomes`.
    """

    __test__ = False

    kind: Kind
    outcomes: dict[str, str]
    seconds: float
    message: str
    tampered: bool
    failures: dict[str, str] = field(default_factory=dict)


def run_tests(
    sandbox: Sandbox,
    files: dict[str, bytes | str],
    tests: list[str] | None = None,
    limits: Limits | None = None,
    protected: tuple[str, ...] = (),
) -> TestReport:
    """Run pytest on `files` in the sandbox.

    Args:
        files: path relative to the work area -> content: the package (at the top or in `src/`) and its tests.
        tests: files or node ids; None collects what pytest finds.
        protected: files the code under test cannot change; files named by `tests` always are, and without `tests`
            all that look like tests.
    """
    raise NotImplementedError
