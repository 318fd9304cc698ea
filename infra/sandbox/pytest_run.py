"""Test runs whose outcomes the code under test cannot write by itself.

An outcome counts only when a record of it came, in its place and sealed with a key of this run, from the reporter
(`inside/tests.py`), which looks for changes to pytest first; exit codes, output and report files count for nothing.
A test of our own that must fail runs last: where it passes, nothing else that passed is believed.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from infra.sandbox.container import Ended
from m1.tasks.sandbox import Job, Kind, Limits, TestReport

OUTCOMES = ("passed", "failed", "error", "skipped")
#: pytest's own list of folders that are not searched for tests (`norecursedirs`).
_NOT_ENTERED = ("_darcs", "build", "CVS", "dist", "node_modules", "venv")
_MUST_FAIL = "def test_that_must_fail():\n    found = [1, 2]\n    assert found == [1, 3]\n"


class Attempts(Protocol):
    """The part of `infra.sandbox.runner.Sandbox` that is used here."""

    def attempt(self, job: Job, tests: dict[str, Any] | None = None) -> Ended: ...


def run_tests(
    sandbox: Attempts,
    files: dict[str, bytes | str],
    tests: Sequence[str] | None = None,
    limits: Limits | None = None,
    protected: tuple[str, ...] = (),
) -> TestReport:
    """Run pytest on `files` in the sandbox, without conftest files, settings of the project and plugins.

    Args:
        files: path relative to the work area -> content: the package (at the top or in `src/`) and its tests.
        tests: files, folders or node ids; None collects what pytest finds.
        protected: files the code under test cannot change; files named by `tests` always are, and without `tests`
            all that look like tests.

    Raises:
        UsageError: a path is not a plain relative path, or `protected` names what is not in `files`.
    """
    canary = f".m1/test_{secrets.token_hex(8)}.py"
    named = None if tests is None else _roots({test.split("::")[0].rstrip("/") for test in tests})
    there = None if named is None else [name for name in named if _exists(name, files)]
    kept = {*protected, canary, *(path for path in files if _is_test(path, named))}
    job = Job({**files, canary: _MUST_FAIL}, ["pytest"], limits or Limits(), protected=tuple(sorted(kept)))
    secret = secrets.token_bytes(32)
    spec = {
        "secret": secret.hex(),
        "extra": canary,
        "tests": None if tests is None else list(tests),
        "paths": [*(_top(files) if there is None else there), canary],
    }
    ended = sandbox.attempt(job, spec)
    records, genuine = _open(ended, secret)
    return _report(ended, records, genuine, tests, canary)


def _roots(names: set[str]) -> list[str]:
    """Without what lies below another one: it would be collected twice."""
    return sorted(name for name in names if not any(name.startswith(f"{other}/") for other in names))


def _top(files: dict[str, bytes | str]) -> list[str]:
    """What pytest would look into at the top of the work area. Given ".", it would swallow the test that must fail."""
    tops = {path.partition("/")[:2] for path in files}
    folders = {name for name, slash in tops if slash and not name.startswith(".") and name not in _NOT_ENTERED}
    return sorted(folders | {name for name, slash in tops if not slash and _named_like_a_test(name)})


def _named_like_a_test(name: str) -> bool:
    return name.endswith("_test.py") or (name.startswith("test_") and name.endswith(".py"))


def _exists(name: str, files: dict[str, bytes | str]) -> bool:
    return name in files or any(path.startswith(f"{name}/") for path in files)


def _is_test(path: str, named: list[str] | None) -> bool:
    if named is not None:
        return any(path == name or path.startswith(f"{name}/") for name in named)
    *folders, name = path.split("/")
    return _named_like_a_test(name) or "tests" in folders


def _open(ended: Ended, secret: bytes) -> tuple[list[dict[str, Any]], bool]:
    """Records with the right seal in the right order, and whether there were no others."""
    records: list[Any] = []
    for message in ended.messages:
        body, seal = message.get("body"), message.get("seal")
        if not isinstance(body, str) or not isinstance(seal, str) or not seal.isascii():
            return records, False
        right = hmac.new(secret, f"{len(records)}:{body}".encode(), "sha256").hexdigest()
        if not hmac.compare_digest(right, seal):
            return records, False
        record = json.loads(body)
        if not isinstance(record, dict):
            return records, False
        records.append(record)
    return records, not ended.nonsense


def _report(
    ended: Ended, records: list[dict[str, Any]], genuine: bool, tests: Sequence[str] | None, canary: str
) -> TestReport:
    result = ended.result
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    collected: list[str] = []
    faults = [] if genuine else ["records that are not the reporter's"]
    finish = None
    for record in records:
        if "collected" in record:
            collected = record["collected"]
        elif "broken" in record:
            failures[record["broken"]] = record["why"]
        elif "tampered" in record:
            faults.append(record["tampered"])
        elif "finish" in record:
            finish = record["finish"]
        elif record.get("test") in outcomes or record.get("outcome") not in OUTCOMES:
            faults.append(f"{record.get('test')} was reported twice, or as {record.get('outcome')}")
        else:
            outcomes[str(record.get("test"))] = record["outcome"]
            if record.get("why"):
                failures[str(record.get("test"))] = record["why"]
    proof = outcomes.pop(canary_id := f"{canary}::test_that_must_fail", None)
    failures.pop(canary_id, None)
    if proof not in (None, "failed"):
        faults.append(f"a test that must fail {proof}")
    _complete(outcomes, failures, [node for node in collected if node != canary_id], tests)
    message, kind = result.message, result.kind
    if kind in (Kind.OK, Kind.KILLED) and (finish is None or proof is None):
        kind = Kind.KILLED
        message = message or f"the test process ended before its tests (exit code {result.exit_code})"
    if faults:
        outcomes = {node: "error" if outcome == "passed" else outcome for node, outcome in outcomes.items()}
        message = f"tampered: {faults[0]}"
    return TestReport(kind, outcomes, result.seconds, message, bool(faults), failures, result.output)


def _complete(
    outcomes: dict[str, str], failures: dict[str, str], collected: list[str], tests: Sequence[str] | None
) -> None:
    """What was collected or asked for and has no outcome of its own is an error."""
    for node in collected:
        if node not in outcomes:
            outcomes[node] = "error"
            failures[node] = "did not run to its end"
    for test in tests or ():
        if not any(node == test or node.startswith((f"{test}::", f"{test}[", f"{test}/")) for node in outcomes):
            outcomes[test] = "error"
            failures.setdefault(test, failures.get(test.split("::")[0], "was not collected"))
