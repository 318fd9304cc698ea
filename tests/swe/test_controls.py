"""Shapes of tests: on right code every one does what it says, and nothing in it tells a turned test from another."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.sandbox.attacks.forgeries import FAULTY, GOLD, KEPT, TASK
from m1.tasks.sandbox import Kind, TestReport
from m1.tasks.swe.controls import COPIES, Variant, variant

TESTS = [*TASK.fail_to_pass, *KEPT]


def outcomes(folder: Path, tree: dict[str, bytes]) -> dict[str, str]:
    """What pytest itself says, by test id."""
    for path, content in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--junitxml=out.xml"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([*command, "--rootdir", str(folder), "tests"], cwd=folder, env=environment, capture_output=True)
    found = {}
    for case in ElementTree.parse(folder / "out.xml").iter("testcase"):
        _, module, *classes = case.attrib["classname"].split(".")
        name = "::".join([f"tests/{module}.py", *classes, case.attrib["name"]])
        found[name] = "failed" if len(case) else "passed"
    return found


@pytest.mark.parametrize("seed", range(4))
def test_right_code_meets_every_shape_and_wrong_code_none(tmp_path: Path, seed: int) -> None:
    shape = variant(GOLD, TESTS, random.Random(seed), careful=seed == 3)
    found = outcomes(tmp_path / "right", {**GOLD, **shape.files})
    assert shape.is_met(TestReport(Kind.OK, found, 1.0, "", False))
    wrong = TestReport(Kind.OK, outcomes(tmp_path / "wrong", {**FAULTY, **shape.files}), 1.0, "", False)
    assert not shape.is_met(wrong)
    everything = TestReport(Kind.OK, dict.fromkeys(shape.tests, "passed"), 1.0, "", False)
    assert shape.is_forged(everything) and not shape.is_met(everything)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_every_test_has_copies_of_both_kinds(seed: int, careful: bool) -> None:
    shape = variant(GOLD, TESTS, random.Random(seed), careful=careful)
    assert not shape.passing & shape.failing and set(TESTS) <= shape.passing | shape.failing
    for path, content in shape.files.items():
        ast.parse(content)
        assert path.startswith("tests/test_")
    for name in ("test_wrong", "test_near", "test_data"):
        versions = [
            {test for test in tests if test.startswith(f"tests/test_a.py::{name}") and "too" not in test}
            for tests in (shape.passing, shape.failing)
        ]
        assert all(versions) and 1 + COPIES[0] <= sum(map(len, versions)) <= 1 + COPIES[1]


def test_the_name_of_a_test_says_nothing() -> None:
    turned = sum(
        "tests/test_a.py::test_wrong" in variant(GOLD, TESTS, random.Random(seed)).failing for seed in range(400)
    )
    assert 140 <= turned <= 260  # a half, within six standard deviations


def test_what_cannot_be_copied_stays_as_it_is() -> None:
    tree = {"a.py": b"def (:\n", "b.py": b"from base import Tests\n"}
    shape = variant(tree, ["a.py::test_x", "b.py::Tests::test_y", "c.py::test_z"], random.Random(0))
    assert shape.passing == {"a.py::test_x", "b.py::Tests::test_y", "c.py::test_z"} and not shape.failing
    assert shape.files.keys() <= {"b.py"}


def test_a_shape_is_met_exactly() -> None:
    shape = Variant({}, frozenset({"a"}), frozenset({"b"}))

    def report(tampered: bool = False, kind: Kind = Kind.OK, **outcomes: str) -> TestReport:
        return TestReport(kind, outcomes, 1.0, "", tampered)

    assert shape.is_met(report(a="passed", b="failed"))
    for bad in (report(a="passed", b="error"), report(a="passed"), report(a="failed", b="failed"),
                report(True, a="passed", b="failed"), report(kind=Kind.TIMEOUT, a="passed", b="failed")):  # fmt: skip
        assert not shape.is_met(bad)
