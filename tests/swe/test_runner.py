"""Runs that share a container do not see each other, and one that ends badly does not end the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.sandbox import Sandbox
from infra.sandbox.images import build_environment
from m1 import paths
from m1.errors import M1Error
from m1.tasks.swe import sources
from m1.tasks.swe.reward import LIMITS
from m1.tasks.swe.runner import Report, Request, run
from m1.tasks.swe.sources import Package
from tests.needed import need_engine

PACKAGE = Package(
    name="made", licence="MIT", package="made", version="1", sha256="0" * 64, code=["src/made"], tests=["tests"],
    import_root="src",
)  # fmt: skip
RIGHT = b"def double(x):\n    return 2 * x\n"
TESTS = b"""
import os
import made


def test_double():
    assert made.double(4) == 8


def test_zero():
    assert made.double(0) == 0


def test_nothing_is_left_of_another_run():
    assert "LEFT" not in os.environ and made.double.__doc__ is None
    try:
        open("left", "w").close()
        assert False, "the tree can be written into"
    except OSError:
        pass
    os.environ["LEFT"] = made.double.__doc__ = "1"
"""
ALL = {f"tests/test_made.py::{name}" for name in ("test_double", "test_zero", "test_nothing_is_left_of_another_run")}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    need_engine()
    try:
        image = build_environment(
            "default", sources.load(paths.DATA_SPECS / "swe.yaml").environments["default"].requirements
        )
        opened = Sandbox(image=image, limits=LIMITS, preload=False)
    except M1Error as error:
        pytest.skip(f"no sandbox here: {error}")
    with opened:
        yield opened


def request(code: bytes, **settings: object) -> Request:
    tree = {"src/made/__init__.py": code, "tests/test_made.py": TESTS}
    return Request(tree, seconds=20.0, seconds_per_test=2.0, **settings)  # type: ignore[arg-type]


def ends(sandbox: Sandbox, codes: list[bytes], **settings: object) -> list[Report]:
    return run(sandbox, PACKAGE, [request(code, **settings) for code in codes], workers=1)


def test_each_run_sees_its_own_tree_and_nothing_of_the_others(sandbox: Sandbox) -> None:
    # Of the same length, so that nothing but its content tells one file from the other.
    faulty = [RIGHT.replace(b"2 * x", expression) for expression in (b"3 * x", b"2 + x", b"2 * x", b"4 * 2")]
    reports = ends(sandbox, [RIGHT, *faulty])
    assert [report.end for report in reports] == ["done"] * 5
    failed = [{test.rpartition("_")[2] for test in report.failed} for report in reports]
    assert failed == [set(), {"double"}, {"double", "zero"}, set(), {"zero"}]
    assert all(set(report.outcomes) == ALL for report in reports)


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (b"import made.missing", "collection"),
        (b"def double(x):\n    while True: pass", "hung"),
        (b"def double(x):\n    import os; os._exit(0)", "crash"),
        (b"def double(x):\n    y = bytes(1)\n    while True: y = y + y", "memory"),
        (
            b"import os, signal\nif os.fork() == 0:\n    os.setsid()\n    signal.pause()\ndef double(x): return 9",
            "done",
        ),
    ],
)
def test_one_that_ends_badly_does_not_end_the_others(sandbox: Sandbox, code: bytes, end: str) -> None:
    before, bad, after = ends(sandbox, [RIGHT, code + b"\n", RIGHT])
    assert before.passed == after.passed == ALL and before.end == after.end == "done"
    assert bad.end == end and not bad.passed & {"tests/test_made.py::test_double"}


def test_runs_whose_container_was_ended_by_another_are_done_again(sandbox: Sandbox) -> None:
    killer = b"import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
    before, bad, after = ends(sandbox, [RIGHT, killer, RIGHT])
    assert before.passed == after.passed == ALL
    assert bad.end == "crash" and not bad.outcomes


def test_selection_first_failure_and_coverage(sandbox: Sandbox) -> None:
    faulty = RIGHT.replace(b"2 * x", b"2 * x + 1")
    [one] = ends(sandbox, [faulty], select=["tests/test_made.py::test_zero"], failures=1)
    assert set(one.outcomes) == set(one.failures) == {"tests/test_made.py::test_zero"}
    [first] = ends(sandbox, [faulty], stop_at_failure=True)
    assert first.failed == {"tests/test_made.py::test_double"} == set(first.outcomes)
    [traced] = ends(sandbox, [RIGHT], coverage=True)
    assert set(traced.lines["src/made/__init__.py"]["2"]) == ALL - {
        "tests/test_made.py::test_nothing_is_left_of_another_run"
    }
