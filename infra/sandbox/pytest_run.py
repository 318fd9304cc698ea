"""Test runs whose outcomes the code under test cannot write by itself.

An outcome counts only when a record of it came, in its place and sealed with a key of this run, from the reporter
(`inside/tests.py`), which looks for changes to pytest first; exit codes, output and report files count for nothing.
Everything that was laid in is out of the run's reach, and nothing can be made beside it. Files run in random order, and
somewhere among them one of our own, under a name like any other, whose tests must fail: where one passes, nothing else
that passed is believed.
"""

from __future__ import annotations

import hmac
import json
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from infra.sandbox.container import Ended
from m1.tasks.sandbox import Job, Kind, Limits, TestReport

OUTCOMES = ("passed", "failed", "error", "skipped")
#: pytest's own list of folders that are not searched for tests (`norecursedirs`).
_NOT_ENTERED = ("_darcs", "build", "CVS", "dist", "node_modules", "venv")
_WORDS = (
    "basic",
    "cases",
    "edges",
    "forms",
    "inputs",
    "limits",
    "names",
    "order",
    "parts",
    "rules",
    "simple",
    "values",
)
#: Tests that fail, each by another part of pytest or unittest.
_MUST_FAIL = """
import unittest
import pytest


def test_{0}():
    found = [{n}, 2]
    assert found == [{n}, 3]


class {1}(unittest.TestCase):
    def test_{2}(self):
        self.assertEqual({n} + 1, {n})


@pytest.mark.parametrize("value", [{n}, {n} + 1])
def test_{3}(value):
    assert value == pytest.approx({n} + 7)


def test_{4}():
    with pytest.raises(ValueError):
        int("{n}")
"""
_MUST_FAIL_IDS = ("test_{0}", "{1}::test_{2}", "test_{3}[{n}]", "test_{3}[{m}]", "test_{4}")


class Attempts(Protocol):
    """The part of `infra.sandbox.runner.Sandbox` that is used here."""

    def attempt(self, job: Job, tests: dict[str, Any] | None = None) -> Ended: ...


def run_tests(
    sandbox: Attempts,
    files: dict[str, bytes | str],
    tests: Sequence[str] | None = None,
    limits: Limits | None = None,
    hidden: Sequence[str] = (),
) -> TestReport:
    """Run pytest on `files` in the sandbox, without conftest files, settings of the project and plugins.

    Args:
        files: path relative to the work area -> content: the package (at the top or in `src/`) and its tests; none of
            them can be changed by the run, and no other file can be made beside them.
        tests: files, folders or node ids; None collects what pytest finds.
        hidden: those of `files` that are Python modules and lie in the run as compiled code alone, harmlessly varied.

    Raises:
        UsageError: a path is not a plain relative path.
    """
    rng = secrets.SystemRandom()
    named = None if tests is None else _roots({test.split("::")[0].rstrip("/") for test in tests})
    there = _top(files) if named is None else [name for name in named if _exists(name, files)]
    path, content, controls = _controls(there, files, rng)
    laid = {name: content for name, content in files.items() if name not in set(hidden)}
    job = Job({**laid, path: content}, ["pytest"], limits or Limits(), sealed=True)
    secret = secrets.token_bytes(32)
    inside = any(path.startswith(f"{name}/") for name in there)
    paths = [*there, *([] if inside else [path])]
    rng.shuffle(paths)
    spec = {
        "secret": secret.hex(),
        "tests": None if tests is None else rng.sample([*tests, *controls], len(tests) + len(controls)),
        "paths": paths,
        "seed": rng.getrandbits(64),
        "hidden": {name: _latin(files[name]) for name in hidden},
    }
    ended = sandbox.attempt(job, spec)
    records, genuine = _open(ended, secret)
    return _report(ended, records, genuine, tests, controls)


def _controls(there: Sequence[str], files: Mapping[str, Any], rng: random.Random) -> tuple[str, str, list[str]]:
    """A file of tests that must fail, beside one of the others: its path, its content, and the ids of its tests."""
    beside = [name for name in there if name.endswith(".py")]
    folder = str(PurePosixPath(rng.choice(beside)).parent) if beside else "."
    taken = {PurePosixPath(path).name for path in files}
    while (name := f"test_{'_'.join(rng.sample(_WORDS, 2))}.py") in taken:
        pass
    path = name if folder == "." else f"{folder}/{name}"
    words = [word.title() if number == 1 else word for number, word in enumerate(rng.sample(_WORDS, 5))]
    number = rng.randint(3, 99)
    content = _MUST_FAIL.format(*words, n=number)
    return path, content, [f"{path}::{test.format(*words, n=number, m=number + 1)}" for test in _MUST_FAIL_IDS]


def _latin(content: bytes | str) -> str:
    """Bytes as text that JSON takes."""
    return (content.encode() if isinstance(content, str) else bytes(content)).decode("latin-1")


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
    ended: Ended, records: list[dict[str, Any]], genuine: bool, tests: Sequence[str] | None, controls: Sequence[str]
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
    proofs = [outcomes.pop(control, None) for control in controls]
    for control in controls:
        failures.pop(control, None)
    if wrong := [proof for proof in proofs if proof not in (None, "failed")]:
        faults.append(f"a test that must fail {wrong[0]}")
    _complete(outcomes, failures, [node for node in collected if node not in controls], tests)
    message, kind = result.message, result.kind
    if kind in (Kind.OK, Kind.KILLED) and (finish is None or None in proofs):
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
