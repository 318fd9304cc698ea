"""Judge an answer to a task: apply it strictly, run the tests that matter in the sandbox, say how it ended.

The report says only that the reward is positive if and only if all relevant tests pass, and zero or negative for a
compile error, a runtime failure or a regression (MiniMax-M1 report §4.1); zero is this project's choice, `Weights`
has a number for each end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from m1.errors import M1Error
from m1.tasks.sandbox import Kind, Limits, Sandbox, TestReport
from m1.tasks.swe.localise import overlap, parse_locations
from m1.tasks.swe.patches import PatchError, Tree, apply_answer, apply_diff
from m1.tasks.swe.python_source import NotPython, parse
from m1.tasks.swe.tasks import SweTask, TaskSet

MAX_ANSWER = 200_000
#: Of the run that judges an answer; suites of the packages in data_specs/swe.yaml take some seconds.
LIMITS = Limits(memory_mb=768, cpus=1.0, pids=128, file_mb=64, work_mb=256, output_kb=256, seconds=300.0)


class End(Enum):
    """How an answer ended."""

    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"  # some test that must pass does not, none that passed before broke
    REGRESSION = "regression"  # a test that passed before fails now
    COMPILE_ERROR = "compile-error"  # a changed file does not parse
    RUNTIME_ERROR = "runtime-error"  # the run ended early: crash, time, memory, output; or the code cannot be imported
    BAD_PATCH = "bad-patch"  # in no known form, does not apply, or leaves the tree
    EMPTY = "empty"
    TAMPERED = "tampered"  # the answer changed the test run itself


#: A response without an answer block; it never reaches the sandbox.
NO_ANSWER = "no-answer"
ENDS = (*(end.value for end in End), NO_ANSWER)


@dataclass(frozen=True)
class Weights:
    """Reward of every end but `resolved`, which earns 1 (for localisation: its overlap)."""

    unresolved: float = 0.0
    regression: float = 0.0
    compile_error: float = 0.0
    runtime_error: float = 0.0
    bad_patch: float = 0.0
    empty: float = 0.0
    tampered: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """What an answer earned. `value` is 1 for resolved, the overlap for localisation, else the weight of its end."""

    end: End
    value: float
    message: str = ""
    fixed: int = 0
    broken: int = 0

    @property
    def resolved(self) -> bool:
        return self.end is End.RESOLVED


def _ended(end: End, weights: Weights, message: str = "", fixed: int = 0, broken: int = 0) -> Judgement:
    value = 1.0 if end is End.RESOLVED else getattr(weights, end.name.lower())
    return Judgement(end, value, message[:500], fixed, broken)


# --- localisation ---


def judge_locations(task: SweTask, answer: str, weights: Weights = Weights()) -> Judgement:
    """Score by overlap; `resolved` means that exactly the right places are named. Needs no sandbox."""
    named = parse_locations(answer)
    if not named:
        return _ended(End.EMPTY, weights, "no `path: element` line")
    value = overlap(named, task.locations)
    if value == 1.0:
        return Judgement(End.RESOLVED, 1.0)
    return Judgement(End.UNRESOLVED, value if value > 0 else weights.unresolved)


# --- repair ---


def judge_repair(
    sandbox: Sandbox,
    task: SweTask,
    faulty: Mapping[str, bytes],
    pass_to_pass: Sequence[str],
    answer: str,
    *,
    limits: Limits | None = None,
    weights: Weights = Weights(),
) -> Judgement:
    """Apply the answer to the faulty tree, lay the task's own tests over it, and run the relevant tests.

    Raises:
        M1Error: the sandbox failed, which says nothing about the answer.
    """
    if not answer.strip():
        return _ended(End.EMPTY, weights)
    try:
        if len(answer) > MAX_ANSWER:
            raise PatchError(f"the answer has {len(answer)} characters, at most {MAX_ANSWER} are read")
        patched = apply_answer(faulty, answer)
        final = restore(task, faulty, patched)
    except (PatchError, UnicodeEncodeError) as error:
        return _ended(End.BAD_PATCH, weights, str(error))
    if final == dict(faulty):
        return _ended(End.EMPTY, weights, "the patch changes nothing but tests")
    if broken := compile_error(faulty, final):
        return _ended(End.COMPILE_ERROR, weights, broken)
    wanted = [*task.fail_to_pass, *pass_to_pass]
    report = sandbox.run_tests(dict(final), wanted, limits or LIMITS)
    return classify(report, task.fail_to_pass, pass_to_pass, weights)


def files_of_tests(task: SweTask) -> set[str]:
    """Files that hold the relevant tests."""
    tests = [*task.fail_to_pass, *(task.pass_to_pass or ())]
    return {test.partition("::")[0] for test in tests}


def restore(task: SweTask, faulty: Mapping[str, bytes], patched: Mapping[str, bytes]) -> Tree:
    """The patched tree with the tests as the task has them: no answer changes what it is judged by.

    Kept from the faulty tree: test files, everything in folders named `tests` or `test`, `conftest.py` and the files
    that configure pytest; such files that the answer adds are taken out. Then the test patch is laid over.
    """
    final = {path: content for path, content in patched.items() if not is_guarded(path)}
    final |= {path: content for path, content in faulty.items() if is_guarded(path)}
    final |= {path: faulty[path] for path in files_of_tests(task) if path in faulty}
    return apply_diff(final, task.test_patch) if task.test_patch else final


_CONFIGURES = {"conftest.py", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg", "pytest.py",
               "sitecustomize.py", "usercustomize.py", "_pytest"}  # fmt: skip


def is_guarded(path: str) -> bool:
    """Whether a file is a test, or has a say in how tests run: no answer may change it, no fault is put into it."""
    *folders, name = path.split("/")
    in_tests = any(folder in ("tests", "test", "_pytest", "pytest") for folder in folders)
    return in_tests or name in _CONFIGURES or name.endswith(".pth") or bool(re.match(r"^(test_.*|.*_test)\.py$", name))


def compile_error(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> str:
    """The first changed Python file that does not parse, with the reason; empty if all do."""
    for path in sorted(after):
        if path.endswith(".py") and before.get(path) != after[path]:
            try:
                parse(after[path])
            except NotPython as error:
                return f"{path}: {error}"
    return ""


def classify(
    report: TestReport,
    fail_to_pass: Sequence[str],
    pass_to_pass: Sequence[str],
    weights: Weights = Weights(),
) -> Judgement:
    """The end of a test run.

    Raises:
        M1Error: the sandbox failed.
    """
    if report.kind is Kind.INFRASTRUCTURE:
        raise M1Error(f"the sandbox failed: {report.message}", "Check the engine; the answer was not judged.")
    if report.tampered:
        return _ended(End.TAMPERED, weights, report.message)
    passed = {test for test, outcome in report.outcomes.items() if outcome == "passed"}
    fixed = sum(test in passed for test in fail_to_pass)
    broken = [test for test in pass_to_pass if test not in passed]
    if report.kind is not Kind.OK:
        return _ended(End.RUNTIME_ERROR, weights, f"{report.kind.value}: {report.message}", fixed, len(broken))
    wanted = [*fail_to_pass, *pass_to_pass]
    if wanted and all(report.outcomes.get(test, "error") == "error" for test in wanted):
        return _ended(End.RUNTIME_ERROR, weights, f"no test ran: {report.message}", fixed, len(broken))
    if broken:
        return _ended(End.REGRESSION, weights, f"{broken[0]} passed before", fixed, len(broken))
    if fixed < len(fail_to_pass):
        return _ended(End.UNRESOLVED, weights, f"{len(fail_to_pass) - fixed} tests still fail", fixed)
    return _ended(End.RESOLVED, weights, "", fixed)


def judge(
    sandbox: Sandbox, tasks: TaskSet, task: SweTask, answer: str, *, limits: Limits | None = None,
    weights: Weights = Weights(),
) -> Judgement:  # fmt: skip
    """Judge an answer to a task of a set, whatever its kind.

    Raises:
        M1Error: the sandbox failed.
    """
    if task.kind == "localise":
        return judge_locations(task, answer, weights)
    if task.kind == "write-test":
        return judge_test(sandbox, tasks.faulty(task), tasks.right(task), answer, limits=limits, weights=weights)
    pass_to_pass = tasks.pass_to_pass(task)
    return judge_repair(sandbox, task, tasks.faulty(task), pass_to_pass, answer, limits=limits, weights=weights)


# --- test synthesis ---

TEST_FILE = "test_m1_answer.py"


def judge_test(
    sandbox: Sandbox,
    faulty: Mapping[str, bytes],
    right: Mapping[str, bytes],
    answer: str,
    *,
    limits: Limits | None = None,
    weights: Weights = Weights(),
) -> Judgement:
    """A test file earns if all its tests pass on the right tree, twice, and one fails on the faulty one.

    Raises:
        M1Error: the sandbox failed.
    """
    code = code_of_test(answer)
    if not code.strip():
        return _ended(End.EMPTY, weights)
    try:
        parse(code.encode("utf-8", "strict"))
    except (NotPython, UnicodeEncodeError) as error:
        return _ended(End.COMPILE_ERROR, weights, str(error))
    reports = []
    for tree in (right, right, faulty):
        files: dict[str, bytes | str] = {**tree, TEST_FILE: code}
        report = sandbox.run_tests(files, [TEST_FILE], limits or LIMITS)
        if report.kind is Kind.INFRASTRUCTURE:
            raise M1Error(f"the sandbox failed: {report.message}", "Check the engine; the answer was not judged.")
        if report.tampered:
            return _ended(End.TAMPERED, weights, report.message)
        if report.kind is not Kind.OK:
            return _ended(End.RUNTIME_ERROR, weights, f"{report.kind.value}: {report.message}")
        reports.append(report)
    once, again, on_faulty = reports
    return classify_test(once, again, on_faulty, weights)


def classify_test(right: TestReport, again: TestReport, faulty: TestReport, weights: Weights = Weights()) -> Judgement:
    """The end of a written test from its two runs on the right tree and its run on the faulty one."""
    results = list(right.outcomes.values())
    if not results or "passed" not in results or "error" in results:
        return _ended(End.RUNTIME_ERROR, weights, f"no test passes on the right code: {right.message}")
    if "failed" in results or right.outcomes != again.outcomes:
        return _ended(End.REGRESSION, weights, "a test fails on the right code, or not always passes")
    caught = [t for t, outcome in right.outcomes.items() if outcome == "passed" and faulty.outcomes.get(t) == "failed"]
    if not caught:
        return _ended(End.UNRESOLVED, weights, "no test fails on the faulty code")
    return _ended(End.RESOLVED, weights, "", len(caught))


def code_of_test(answer: str) -> str:
    """The test file of an answer: its one fenced block, or all of it if there is no fence."""
    blocks = re.findall(r"^```(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", answer, re.MULTILINE | re.DOTALL)
    return blocks[-1] if blocks else ("" if "```" in answer else answer)
