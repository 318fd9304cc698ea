"""Attacks on the outcome of a test run. The solution under test is wrong in all of them: no failing test may pass.

`test_honest` shows that the same solution without an attack is judged right, and agrees with pytest itself.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox_jobs import SMALL

from infra.sandbox import Kind, Sandbox
from infra.sandbox.attacks.single_run import AT_RUN_TIME, ENDS_EARLY, PATCHES, POLITE_ENDS
from infra.sandbox.pytest_run import run_tests
from m1.tasks.sandbox import TestReport

WRONG = "def double(x):\n    return x + 1\n\ndef same(x):\n    return x\n"
TEST = """
import unittest
import pytest
from solution import double, same

def test_right():
    assert same(3) == 3

def test_wrong():
    assert double(3) == 6

class TestCase(unittest.TestCase):
    def test_wrong_too(self):
        self.assertEqual(double(5), 10)

@pytest.mark.parametrize("x", [1, 2])
def test_many(x):
    assert double(x) == 2 * x
"""
LATER = "from solution import double\n\ndef test_later():\n    assert double(4) == 8\n"
FILES: dict[str, bytes | str] = {"solution.py": WRONG, "tests/test_a.py": TEST, "tests/test_b.py": LATER}
FAILING = (
    "test_a.py::test_wrong",
    "test_a.py::TestCase::test_wrong_too",
    "test_a.py::test_many[2]",
    "test_b.py::test_later",
)


def attack(sandbox: Sandbox, solution: str, **more: str) -> TestReport:
    """Outcome of the tests with `solution` in front of the wrong functions; no failing test has passed."""
    files = {**FILES, **more, "solution.py": solution + "\n" + WRONG}
    report = run_tests(sandbox, files, ["tests/test_a.py", "tests/test_b.py"], SMALL)
    passed = [node for node, outcome in report.outcomes.items() if outcome == "passed"]
    assert not set(passed) & {f"tests/{name}" for name in FAILING}, report
    assert report.kind is not Kind.INFRASTRUCTURE, report
    if report.tampered:
        assert not passed, report
    return report


def test_honest(sandbox: Sandbox) -> None:
    report = attack(sandbox, "")
    assert (report.kind, report.tampered, report.message) == (Kind.OK, False, "")
    right = {"tests/test_a.py::test_right", "tests/test_a.py::test_many[1]"}
    assert report.outcomes == {
        **{node: "passed" for node in right},
        **{f"tests/{name}": "failed" for name in FAILING},
    }
    assert "assert 4 == 6" in report.failures["tests/test_a.py::test_wrong"]
    good = {**FILES, "solution.py": "def double(x): return 2 * x\ndef same(x): return x\n"}
    for tests in (None, ["tests"], ["tests/test_a.py", "tests/test_b.py"], ["tests", "tests/test_a.py"]):
        report = run_tests(sandbox, good, tests, SMALL)
        assert set(report.outcomes.values()) == {"passed"} and len(report.outcomes) == 6, report
        assert (report.kind, report.message) == (Kind.OK, ""), report


MANY_KINDS = """
import builtins, sys, unittest, warnings
from unittest import mock
import pytest

@pytest.fixture
def broken(): raise RuntimeError("in a fixture")
@pytest.fixture
def broken_end():
    yield 1
    raise RuntimeError("at the end of a fixture")
@pytest.fixture(scope="module")
def wide(): yield [1]

def test_pass(wide): assert wide == [1]
def test_fail(): assert {"a": [1, 2]} == {"a": [1, 3]}
def test_raise(): raise ValueError("x")
def test_error(broken): pass
def test_end(broken_end): pass
def test_skip(): pytest.skip("not now")
@pytest.mark.skipif(True, reason="never")
def test_skipif(): pass
@pytest.mark.xfail
def test_xfail(): assert False
@pytest.mark.xfail
def test_xpass(): pass
@pytest.mark.xfail(strict=True)
def test_xpass_strict(): pass
@pytest.mark.parametrize("value", ["a", "b c", "d/e", "[x]"])
def test_params(value): assert value != "b c"
def test_exit(): sys.exit(0)
def test_patching(monkeypatch, capsys, tmp_path, recwarn):
    monkeypatch.setattr(builtins, "open", lambda *a: 1)
    monkeypatch.setattr(sys, "argv", ["x"])
    with mock.patch("builtins.print") as p, mock.patch("json.dumps", return_value="1"):
        import json
        assert json.dumps(3) == "1"; print("x")
    warnings.warn("w")
    assert p.called and open("x") == 1
def test_write(tmp_path): (tmp_path / "x").write_text("y")
class TestThings:
    def test_method(self): assert isinstance(self, TestThings)
class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.n = 1
    def setUp(self): self.m = 2
    def test_ok(self): self.assertEqual(self.n + self.m, 3)
    def test_bad(self):
        with self.assertRaises(KeyError): pass
    @unittest.skip("no")
    def test_skipped(self): pass
    @unittest.expectedFailure
    def test_expected(self): self.fail()
    def test_sub(self):
        for i in range(3):
            with self.subTest(i=i): self.assertNotEqual(i, 1)
    def test_sub_good(self):
        for i in range(3):
            with self.subTest(i=i): self.assertLess(i, 5)
"""


def test_names_of_tests_are_the_same_in_every_container(sandbox: Sandbox) -> None:
    words = [f"word{i}" for i in range(12)]
    body = f"import pytest\n@pytest.mark.parametrize('word', {{*{words}}})\ndef test_one(word): pass\n"
    body += (
        "@pytest.mark.parametrize('number', list(enumerate(set('abcdefgh'))), ids=str)\ndef test_two(number): pass\n"
    )
    first, second = (run_tests(sandbox, {"test_named.py": body}, None, SMALL).outcomes for _ in range(2))
    assert len(first) == 20 and first == second


def test_outcomes_agree_with_pytest(sandbox: Sandbox, tmp_path: Path) -> None:
    """The oracle is pytest's own JUnit report of a bare run."""
    (tmp_path / "test_kinds.py").write_text(MANY_KINDS)
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    subprocess.run([*command, "--rootdir", str(tmp_path), "--junitxml=out.xml"], cwd=tmp_path, capture_output=True)
    names = {"failure": "failed", "error": "error", "skipped": "skipped"}
    expected: dict[str, str] = {}
    for case in ElementTree.parse(tmp_path / "out.xml").iter("testcase"):
        parts = case.attrib["classname"].split(".")[1:]
        node = "::".join(["test_kinds.py", *parts, case.attrib["name"]])
        outcome = next((names[child.tag] for child in case if child.tag in names), "passed")
        expected[node] = max(expected.get(node, "passed"), outcome, key=["passed", "skipped", "failed", "error"].index)
    assert len(expected) == 24
    report = run_tests(sandbox, {"test_kinds.py": MANY_KINDS}, None, SMALL)
    assert not report.tampered and report.kind is Kind.OK, report
    assert report.outcomes == expected


def test_node_ids_select_and_missing_ones_are_errors(sandbox: Sandbox) -> None:
    wanted = ["tests/test_a.py::test_many", "tests/test_a.py::TestCase", "tests/test_a.py::gone", "none.py::test_x"]
    report = run_tests(sandbox, FILES, [*wanted, "tests/test_b.py::test_later"], SMALL)
    assert report.outcomes == {
        "tests/test_a.py::test_many[1]": "passed",
        "tests/test_a.py::test_many[2]": "failed",
        "tests/test_a.py::TestCase::test_wrong_too": "failed",
        "tests/test_b.py::test_later": "failed",
        "tests/test_a.py::gone": "error",
        "none.py::test_x": "error",
    }


def test_broken_solution_is_an_error_for_every_test_asked_for(sandbox: Sandbox) -> None:
    report = run_tests(sandbox, {**FILES, "solution.py": "def double(:\n"}, ["tests/test_a.py::test_right"], SMALL)
    assert report.outcomes == {"tests/test_a.py::test_right": "error"} and report.kind is Kind.OK
    assert "SyntaxError" in str(report.failures), report


def test_sources_in_src_are_found(sandbox: Sandbox) -> None:
    files = {
        "src/package/__init__.py": "x = 1\n",
        "tests/test_x.py": "import package\ndef test_x(): assert package.x == 1\n",
    }
    assert run_tests(sandbox, files, None, SMALL).outcomes == {"tests/test_x.py::test_x": "passed"}


@pytest.mark.parametrize("name", ENDS_EARLY)
def test_ending_early(sandbox: Sandbox, name: str) -> None:
    solution = ENDS_EARLY[name]
    if "def same" in solution:  # behind the wrong functions, so that it is the one in use
        solution = f"{WRONG}\n{solution}\n_same = same\n"
        report = run_tests(sandbox, {**FILES, "solution.py": solution}, ["tests/test_a.py"], SMALL)
    else:
        report = attack(sandbox, solution)
    assert report.kind is Kind.KILLED, report
    assert report.outcomes and set(report.outcomes.values()) == {"error"}


@pytest.mark.parametrize("name", POLITE_ENDS)
def test_leaving_at_import(sandbox: Sandbox, name: str) -> None:
    report = attack(sandbox, POLITE_ENDS[name])
    assert "passed" not in report.outcomes.values()
    assert set(report.outcomes) >= {"tests/test_a.py", "tests/test_b.py"} or report.kind is not Kind.OK, report


FAKE_FILES = """
import os
xml = '<testsuites><testsuite tests="1"><testcase classname="tests.test_a" name="test_wrong"/></testsuite></testsuites>'
for name in ("report.xml", "junit.xml", "/tmp/junit.xml", "result.json", ".report.json"):
    try: open(name, "w").write(xml)
    except OSError: pass
"""
CONFTEST = """
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    report.outcome = "passed"
def pytest_collection_modifyitems(items): items.clear()
"""


def test_files_that_would_steer_pytest_are_ignored(sandbox: Sandbox) -> None:
    more = {
        "conftest.py": CONFTEST,
        "tests/conftest.py": CONFTEST,
        "evil.py": CONFTEST,
        "pytest.ini": "[pytest]\naddopts = -p evil --co\npython_files = none\n",
        "tox.ini": "[pytest]\naddopts = -p evil\n",
        "setup.cfg": "[tool:pytest]\naddopts = -p evil\n",
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-p evil'\n",
        "sitecustomize.py": "import os; os._exit(0)",
        "usercustomize.py": "import os; os._exit(0)",
        "evil-1.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n",
        "evil-1.dist-info/METADATA": "Name: evil\nVersion: 1\n",
    }
    report = attack(sandbox, FAKE_FILES, **more)
    assert report.kind is Kind.OK and not report.tampered, report
    assert report.outcomes["tests/test_a.py::test_wrong"] == "failed"
    assert report.outcomes["tests/test_a.py::test_right"] == "passed"


def test_editing_the_tests_from_the_solution(sandbox: Sandbox) -> None:
    solution = """
import glob, os
for path in glob.glob("/work/tests/*.py") + glob.glob("/work/.m1/*.py"):
    for attempt in (lambda: open(path, "w").write("def test_wrong(): pass"), lambda: os.unlink(path),
                    lambda: os.rename(path, path + "x"), lambda: os.rename("/work/tests", "/work/t")):
        try: attempt()
        except OSError: pass
"""
    report = attack(sandbox, solution)
    assert report.kind is Kind.OK and report.outcomes["tests/test_b.py::test_later"] == "failed"


def test_compiled_file_in_place_of_a_test(sandbox: Sandbox) -> None:
    """A cache of pytest's own form, with the right time and size, for the test file that is read next."""
    solution = """
import importlib.util, marshal, os, struct, sys, pytest
code = compile("def test_later(): pass\\n", "/work/tests/test_b.py", "exec")
state = os.stat("/work/tests/test_b.py")
try: os.makedirs("/work/tests/__pycache__", exist_ok=True)
except OSError: pass
head = struct.pack("<4sLLL", importlib.util.MAGIC_NUMBER, 0, int(state.st_mtime) & 0xFFFFFFFF, state.st_size)
tag = sys.implementation.cache_tag
for name in (f"test_b.{tag}-pytest-{pytest.__version__}.pyc", f"test_b.{tag}.pyc"):
    try: open("/work/tests/__pycache__/" + name, "wb").write(head + marshal.dumps(code))
    except OSError: pass
"""
    report = attack(sandbox, solution)
    assert report.kind is Kind.OK and report.outcomes["tests/test_b.py::test_later"] == "failed"


@pytest.mark.parametrize("name", PATCHES)
def test_patching(sandbox: Sandbox, name: str) -> None:
    report = attack(sandbox, PATCHES[name])
    # What is aimed at a later file does nothing where that file came first.
    assert report.tampered or (name in ONLY_LATER and report.outcomes["tests/test_b.py::test_later"] == "failed"), (
        report
    )


ONLY_LATER = ("importing of later tests",)


@pytest.mark.parametrize("name", AT_RUN_TIME)
def test_tampering_at_run_time(sandbox: Sandbox, name: str) -> None:
    wrong = WRONG.split("def same")[0]
    solution = wrong + AT_RUN_TIME[name]
    report = run_tests(sandbox, {**FILES, "solution.py": solution}, ["tests/test_a.py", "tests/test_b.py"], SMALL)
    passed = {node for node, outcome in report.outcomes.items() if outcome == "passed"}
    assert not passed & {f"tests/{failing}" for failing in FAILING}, report
    assert report.tampered and not passed, report


def test_limits_hold_for_test_runs(sandbox: Sandbox) -> None:
    endless = run_tests(sandbox, {**FILES, "solution.py": "while True: pass"}, None, replace(SMALL, seconds=4.0))
    assert endless.kind is Kind.TIMEOUT and "passed" not in endless.outcomes.values()
    bomb = run_tests(
        sandbox, {**FILES, "solution.py": "hold = []\nwhile True: hold.append(bytes(1 << 20))"}, None, SMALL
    )
    assert bomb.kind is Kind.MEMORY and "passed" not in bomb.outcomes.values()
    flood = run_tests(sandbox, {**FILES, "solution.py": "import os\nwhile True: os.write(2, b'x' * 9999)"}, None, SMALL)
    assert flood.kind in (Kind.OUTPUT_LIMIT, Kind.OK, Kind.TIMEOUT) and "passed" not in flood.outcomes.values()
