"""The ends of an answer, told apart; what an answer can and cannot change; localisation's score. No engine needed."""

from __future__ import annotations

import random

import pytest

from infra.sandbox import Kind
from m1.errors import M1Error, UsageError
from m1.tasks.sandbox import TestReport
from m1.tasks.swe.answers import code_of_test, compile_error, is_guarded
from m1.tasks.swe.answers import restore as restore_tests
from m1.tasks.swe.patches import make_diff
from m1.tasks.swe.reward import (
    End,
    Weights,
    classify,
    classify_test,
    files_of_tests,
    judge_locations,
    judge_repair,
    judge_test,
    run_tests,
)
from m1.tasks.swe.tasks import SweTask

FAULTY = {"m.py": b"def f():\n    return 1\n", "tests/test_m.py": b"def test_f(): ...\n", "setup.cfg": b""}
RIGHT = {**FAULTY, "m.py": b"def f():\n    return 2\n"}


def task(**changes) -> SweTask:
    values = {
        "id": "x", "kind": "repair", "bug": "x", "source": "m", "base": "0", "licence": "MIT", "split": "train",
        "environment": "default", "origin": "mutation", "issue": "words", "gold_patch": make_diff(FAULTY, RIGHT),
        "locations": (("m.py", "f"),), "fail_to_pass": ("tests/test_m.py::test_f",),
    }  # fmt: skip
    return SweTask(**{**values, **changes})


def report(kind: Kind = Kind.OK, tampered: bool = False, **outcomes: str) -> TestReport:
    return TestReport(kind, outcomes, 1.0, "words", tampered)


def restore(given: SweTask, faulty: dict[str, bytes], patched: dict[str, bytes]) -> dict[str, bytes]:
    return restore_tests(faulty, files_of_tests(given), given.test_patch, patched)


@pytest.mark.parametrize(
    ("given", "end"),
    [
        (report(a="passed", b="passed"), End.RESOLVED),
        (report(a="failed", b="passed"), End.UNRESOLVED),
        (report(b="passed"), End.UNRESOLVED),
        (report(a="passed", b="failed"), End.REGRESSION),
        (report(a="passed", b="skipped"), End.REGRESSION),
        (report(a="passed"), End.REGRESSION),
        (report(a="error", b="error"), End.RUNTIME_ERROR),
        (report(), End.RUNTIME_ERROR),
        (report(Kind.TIMEOUT, a="passed", b="passed"), End.RUNTIME_ERROR),
        (report(Kind.MEMORY), End.RUNTIME_ERROR),
        (report(Kind.KILLED), End.RUNTIME_ERROR),
        (report(tampered=True, a="error", b="error"), End.TAMPERED),
    ],
)
def test_only_all_relevant_tests_earn(given: TestReport, end: End) -> None:
    weights = Weights(unresolved=-0.1, regression=-0.2, runtime_error=-0.3, tampered=-1.0)
    judged = classify(given, ["a"], ["b"], weights)
    assert judged.end is end
    assert (judged.value > 0) == (end is End.RESOLVED)
    assert judged.value == (1.0 if end is End.RESOLVED else getattr(weights, end.name.lower()))


class Failing:
    """A sandbox that fails, or refuses, whatever has this file in it."""

    def __init__(self, only: str, refuses: bool = False) -> None:
        self.only, self.refuses, self.runs = only, refuses, 0

    def run_tests(self, files, tests=None, limits=None, hidden=()) -> TestReport:
        self.runs += 1
        if any(self.only in path for path in files):
            if self.refuses:
                raise UsageError("sandbox path 'x': not a plain relative path")
            return report(Kind.INFRASTRUCTURE)
        return TestReport(Kind.OK, {f"{test}::test_control": "passed" for test in tests}, 1.0, "", False)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_failure_is_the_engines_only_where_a_control_job_fails_too(refuses: bool) -> None:
    answer = make_diff(FAULTY, RIGHT)
    broken = Failing("", refuses)
    with pytest.raises(M1Error, match=r"not judged|not a plain"):
        judge_repair(broken, task(), FAULTY, [], answer)  # type: ignore[arg-type]
    assert broken.runs == 2
    picky = judge_repair(Failing("m.py", refuses), task(), FAULTY, [], answer)  # type: ignore[arg-type]
    assert picky.end is (End.BAD_PATCH if refuses else End.RUNTIME_ERROR) and picky.value == 0.0
    assert "control job" in picky.message
    assert run_tests(Failing("none"), FAULTY, ["a"], None).kind is Kind.OK  # type: ignore[arg-type]


class NoSandbox:
    """Answers that must be refused before anything runs."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError("the sandbox was used")


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (" \n", End.EMPTY),
        ("I do not know.", End.BAD_PATCH),
        ("--- /dev/null\n+++ b/../m.py\n@@ -0,0 +1 @@\n+x\n", End.BAD_PATCH),
        (make_diff({"m.py": b"other\n"}, {"m.py": b"x\n"}), End.BAD_PATCH),
        ("x" * 300_000, End.OVERSIZED),
        (make_diff(FAULTY, {**FAULTY, "m.py": b"def f(:\n"}), End.COMPILE_ERROR),
        (make_diff(FAULTY, {**FAULTY, "m.py": b"x = (" * 5000 + b"\n"}), End.COMPILE_ERROR),
        (make_diff(FAULTY, {**FAULTY, "tests/test_m.py": b"def test_f(): pass\n"}), End.EMPTY),
        (make_diff(FAULTY, {**FAULTY, "conftest.py": b"import os\n", "pytest.py": b""}), End.EMPTY),
    ],
)
def test_what_cannot_be_right_is_not_run(answer: str, end: End) -> None:
    assert judge_repair(NoSandbox(), task(), FAULTY, [], answer).end is end  # type: ignore[arg-type]


def test_no_answer_changes_what_it_is_judged_by() -> None:
    hidden = {**FAULTY, "tests/test_m.py": b"def test_f(): assert f() == 2\n", "tests/data.txt": b"2\n"}
    given = task(test_patch=make_diff(FAULTY, hidden))
    wild = {
        **RIGHT, "tests/test_m.py": b"", "tests/conftest.py": b"", "setup.cfg": b"[x]\n", "sub/test_y.py": b"",
        "sitecustomize.py": b"", "_pytest/runner.py": b"", "m.pth": b"", "n.py": b"",
    }  # fmt: skip
    final = restore(given, FAULTY, wild)
    assert final == {**hidden, "m.py": RIGHT["m.py"], "n.py": b""}
    removed = {"m.py": RIGHT["m.py"]}
    assert restore(given, FAULTY, removed) == {**hidden, "m.py": RIGHT["m.py"]}


@pytest.mark.parametrize("path", ["a/testing.py", "src/latest.py", "contest.py", "my_tests.py"])
def test_ordinary_files_are_not_guarded(path: str) -> None:
    assert not is_guarded(path)


def test_compile_errors_are_looked_for_in_changed_files_only() -> None:
    assert compile_error({"old.py": b"print 1"}, {"old.py": b"print 1", "new.py": b"x = 1"}) == ""
    assert compile_error({}, {"new.py": b"print 1"}).startswith("new.py: SyntaxError")
    assert compile_error({}, {"new.txt": b"print 1"}) == ""


@pytest.mark.parametrize(
    ("answer", "end", "value"),
    [
        ("m.py: f", End.RESOLVED, 1.0),
        ("m.py: g", End.UNRESOLVED, 0.5),
        ("n.py: f", End.UNRESOLVED, 0.0),
        ("somewhere", End.EMPTY, 0.0),
    ],
)
def test_localisation_earns_its_overlap(answer: str, end: End, value: float) -> None:
    judged = judge_locations(task(kind="localise"), answer)
    assert (judged.end, judged.value) == (end, value)


@pytest.mark.parametrize(
    ("right", "again", "faulty", "end"),
    [
        ({"a": "passed"}, {"a": "passed"}, {"a": "failed"}, End.RESOLVED),
        ({"a": "passed", "b": "skipped"}, {"a": "passed", "b": "skipped"}, {"a": "failed"}, End.RESOLVED),
        ({"a": "passed"}, {"a": "passed"}, {"a": "passed"}, End.UNRESOLVED),
        ({"a": "passed"}, {"a": "failed"}, {"a": "failed"}, End.REGRESSION),
        ({"a": "failed"}, {"a": "failed"}, {"a": "failed"}, End.RUNTIME_ERROR),
        ({"a": "failed", "b": "passed"}, {"a": "failed", "b": "passed"}, {"b": "failed"}, End.REGRESSION),
        ({}, {}, {}, End.RUNTIME_ERROR),
        ({"a": "skipped"}, {"a": "skipped"}, {"a": "skipped"}, End.RUNTIME_ERROR),
        ({"a": "error"}, {"a": "error"}, {"a": "failed"}, End.RUNTIME_ERROR),
    ],
)
def test_a_written_test_passes_on_the_right_and_fails_on_the_faulty_code(right, again, faulty, end) -> None:
    judged = classify_test([report(**right), report(**again)], [report(**faulty)], Weights())
    assert (End.RESOLVED if judged is None else judged.end) is end


def test_a_written_test_finds_the_fault_every_time() -> None:
    good = report(a="passed", b="passed")
    assert classify_test([good], [], Weights()) is None
    each_once = [report(a="failed", b="passed"), report(a="passed", b="failed")]
    judged = classify_test([good, good], each_once, Weights())
    assert judged is not None and judged.end is End.UNRESOLVED


class Flipping:
    """Tests that do not look at the code: an outcome as if by a coin, for a file with the answer in it."""

    def __init__(self, chance: float, seed: int) -> None:
        self.rng, self.chance, self.runs = random.Random(seed), chance, 0

    def run_tests(self, files, tests=None, limits=None, hidden=()) -> TestReport:
        self.runs += 1
        assert set(hidden) == {"m.py"}, "what the test is about cannot be read"
        return report(a="passed" if self.rng.random() < self.chance else "failed")


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7])
def test_a_coin_wins_less_than_once_in_a_thousand(chance: float) -> None:
    answer = "```python\ndef test_x(): pass\n```"
    won = sum(
        judge_test(Flipping(chance, seed), FAULTY, RIGHT, answer).resolved  # type: ignore[arg-type]
        for seed in range(3000)
    )
    assert won <= 5  # 3 of 3000 are one in a thousand; expected are 0.7


def test_no_history_and_no_compiled_code_is_within_reach() -> None:
    class Looking(Failing):
        def run_tests(self, files, tests=None, limits=None, hidden=()) -> TestReport:
            assert sorted(files) == ["m.py", "setup.cfg", "tests/test_m.py"]
            assert b"return 2" not in b"".join(files.values())
            return report()

    traces = {".git/packed": b"return 2", "__pycache__/m.cpython-311.pyc": b"return 2", "m.pyc": b"return 2"}
    wrong = {**FAULTY, "m.py": b"def f():\n    return 3\n"}
    judged = judge_repair(Looking(""), task(), {**FAULTY, **traces}, [], make_diff(FAULTY, wrong))  # type: ignore[arg-type]
    assert judged.end is End.RUNTIME_ERROR  # no test ran


class Honest:
    """A test that looks at the code."""

    def run_tests(self, files, tests=None, limits=None, hidden=()) -> TestReport:
        return report(a="passed" if files["m.py"] == RIGHT["m.py"] else "failed")


def test_a_test_that_finds_the_fault_is_paid() -> None:
    assert judge_test(Honest(), FAULTY, RIGHT, "```python\ndef test_x(): pass\n```").value == 1.0  # type: ignore[arg-type]


def test_the_test_file_of_an_answer() -> None:
    assert code_of_test("Words\n```python\nx = 1\n```\nmore") == "x = 1\n"
    assert code_of_test("def test_x(): pass\n") == "def test_x(): pass\n"
    assert code_of_test("```unclosed") == ""
    assert judge_test(NoSandbox(), FAULTY, RIGHT, "```python\ndef (:\n```").end is End.COMPILE_ERROR  # type: ignore[arg-type]
