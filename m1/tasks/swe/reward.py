"""Judge an answer to a task: apply it strictly, run the tests that matter in the sandbox, say how it ended.

The report says only that the reward is positive if and only if all relevant tests pass, and zero or negative for a
compile error, a runtime failure or a regression (MiniMax-M1 report §4.1); zero is this project's choice, `Weights`
has a number for each end.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from m1.errors import M1Error, UsageError
from m1.tasks.confined import confined
from m1.tasks.sandbox import Kind, Limits, Sandbox, TestReport
from m1.tasks.swe.answers import MAX_ANSWER, Repair, is_guarded, parse_locations, read_repair, read_test
from m1.tasks.swe.controls import variant
from m1.tasks.swe.localise import overlap
from m1.tasks.swe.patches import Tree
from m1.tasks.swe.tasks import SweTask, TaskSet

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
    OVERSIZED = "oversized"  # longer than any answer that is read


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
    oversized: float = 0.0


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
    # The message may quote the answer, and goes into files and logs that are UTF-8.
    shown = " ".join(message[:500].encode("utf-8", "replace").decode().split())
    return Judgement(end, value, shown, fixed, broken)


def _oversized(answer: str, weights: Weights) -> Judgement | None:
    if len(answer) <= MAX_ANSWER:
        return None
    return _ended(End.OVERSIZED, weights, f"{len(answer)} characters, at most {MAX_ANSWER} are read")


# --- runs, and whose fault it is when one fails ---

_CONTROL: dict[str, bytes | str] = {"test_control.py": "def test_control():\n    assert sum([20, 22]) == 42\n"}


def run_tests(
    sandbox: Sandbox,
    files: Mapping[str, bytes | str],
    tests: Sequence[str],
    limits: Limits | None,
    hidden: Sequence[str] = (),
) -> TestReport:
    """A test run of a tree with an answer in it, with a kind that is the answer's own doing.

    Where the sandbox fails, or refuses the files, a control job that is known to be good follows on the same engine: if
    that passes, the engine is well, and what failed was the answer.

    Raises:
        M1Error: the sandbox itself failed, which says nothing about the answer.
    """
    limits = limits or LIMITS
    try:
        report = sandbox.run_tests({p: c for p, c in files.items() if not is_trace(p)}, tests, limits, hidden)
        if report.kind is not Kind.INFRASTRUCTURE:
            return report
        kind, failure = Kind.KILLED, M1Error(
            f"the sandbox failed: {report.message}", "Check the engine; the answer was not judged."
        )  # fmt: skip
    except UsageError as error:
        kind, failure = Kind.REFUSED, error
    if not engine_is_well(sandbox, limits):
        raise failure
    return TestReport(kind, {}, 0.0, f"{failure.what} (a control job on the same engine passed)", tampered=False)


def is_trace(path: str) -> bool:
    """Whether a file may hold other code than the tree shows: history, or what was compiled of some version."""
    return not {".git", "__pycache__"}.isdisjoint(path.split("/")) or path.endswith((".pyc", ".pyo"))


def engine_is_well(sandbox: Sandbox, limits: Limits) -> bool:
    """Whether a job that is known to be good passes."""
    try:
        report = sandbox.run_tests(dict(_CONTROL), list(_CONTROL), limits)
    except M1Error:
        return False
    return report.kind is Kind.OK and report.outcomes == {"test_control.py::test_control": "passed"}


# --- localisation ---


def judge_locations(task: SweTask, answer: str, weights: Weights = Weights()) -> Judgement:
    """Score by overlap; `resolved` means that exactly the right places are named. Needs no sandbox."""
    if judged := _oversized(answer, weights):
        return judged
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
    if judged := _oversized(answer, weights):
        return judged
    try:
        repair = confined(read_repair, faulty, files_of_tests(task), task.test_patch, answer)
    except Exception as error:  # reading is a function of the answer alone: whatever goes wrong is its own doing
        repair = Repair({}, End.BAD_PATCH.value, f"{type(error).__name__}: {error}")
    if repair.end:
        return _ended(End(repair.end), weights, repair.message)
    report = run_tests(sandbox, repair.tree, [*task.fail_to_pass, *pass_to_pass], limits)
    judged = classify(report, task.fail_to_pass, pass_to_pass, weights)
    if not judged.resolved:
        return judged
    return _doubted(sandbox, task, faulty, pass_to_pass, repair.tree, limits, weights) or judged


# --- a second look at what says that it is right ---

#: Runs in another shape that a resolved answer must pass, and draws of a shape that suits the tests.
ROUNDS, DRAWS = 2, 3
#: Tests that a shape is made of, at most: of those that failed, and of those that passed before.
MOST_FIXED, MOST_KEPT = 20, 8


def _doubted(
    sandbox: Sandbox, task: SweTask, faulty: Mapping[str, bytes], pass_to_pass: Sequence[str], answered: Tree,
    limits: Limits | None, weights: Weights,
) -> Judgement | None:  # fmt: skip
    """Run the tests in other shapes (`controls`); a judgement if the answer does not stand, else None.

    A shape may not suit the tests: some depend on their names, or on there being only one of them. So whatever goes
    wrong with the answer's tree must go right with the right tree, or the shape says nothing.
    """
    rng = random.SystemRandom()
    right: Tree | None = None
    for _ in range(ROUNDS):
        for draw in range(DRAWS):
            fixed = rng.sample(task.fail_to_pass, min(MOST_FIXED, len(task.fail_to_pass)))
            kept = rng.sample(list(pass_to_pass), min(MOST_KEPT, len(pass_to_pass)))
            shape = variant(answered, [*fixed, *kept], rng, careful=draw == DRAWS - 1)
            report = run_tests(sandbox, {**answered, **shape.files}, shape.tests, limits)
            if shape.is_met(report):
                break
            right = right or read_repair(faulty, files_of_tests(task), task.test_patch, task.gold_patch).tree
            if shape.is_met(run_tests(sandbox, {**right, **shape.files}, shape.tests, limits)):
                if shape.is_forged(report):
                    return _ended(End.TAMPERED, weights, report.message or "a test passed that must fail")
                return _ended(End.UNRESOLVED, weights, "its tests do not pass in every order and under every name")
    return None


def files_of_tests(task: SweTask) -> set[str]:
    """Files that hold the relevant tests."""
    tests = [*task.fail_to_pass, *(task.pass_to_pass or ())]
    return {test.partition("::")[0] for test in tests}


def classify(
    report: TestReport,
    fail_to_pass: Sequence[str],
    pass_to_pass: Sequence[str],
    weights: Weights = Weights(),
) -> Judgement:
    """The end of a test run that the sandbox has done."""
    if report.kind is Kind.REFUSED:
        return _ended(End.BAD_PATCH, weights, report.message)
    if report.tampered:
        return _ended(End.TAMPERED, weights, report.message)
    passed = {test for test, outcome in report.outcomes.items() if outcome == "passed"}
    fixed = sum(test in passed for test in fail_to_pass)
    broken = [test for test in pass_to_pass if test not in passed]
    if report.kind is not Kind.OK:
        return _ended(End.RUNTIME_ERROR, weights, f"{report.kind.value}: {report.message}", fixed, len(broken))
    wanted = [*fail_to_pass, *pass_to_pass]
    if not fail_to_pass:  # nothing shows that the fault is gone
        return _ended(End.UNRESOLVED, weights, "the task has no test that must pass")
    if all(report.outcomes.get(test, "error") == "error" for test in wanted):
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
#: Runs of a written test: SURE of them on each tree, DRAWN on one drawn by lot. A test that does not look at the code
#: has to guess the tree of every run: a coin is right in 1 of 2^12, the best fixed order, if it knew the number of the
#: run, in 1 of 3,000.
SURE, DRAWN = 2, 8


def judge_test(
    sandbox: Sandbox,
    faulty: Mapping[str, bytes],
    right: Mapping[str, bytes],
    answer: str,
    *,
    limits: Limits | None = None,
    weights: Weights = Weights(),
) -> Judgement:
    """A test file earns if all its tests pass on the right tree and one fails on the faulty one, every time.

    It is run on the trees in an order drawn by lot that nothing in a run tells. It cannot read the code, which lies
    there compiled and varied in what does nothing: only what the code does tells one tree from the other.

    Raises:
        M1Error: the sandbox failed.
    """
    if judged := _oversized(answer, weights):
        return judged
    try:
        code, end, message = confined(read_test, answer)
    except Exception as error:  # as in judge_repair
        code, end, message = "", End.COMPILE_ERROR.value, f"{type(error).__name__}: {error}"
    if end:
        return _ended(End(end), weights, message)
    rng = random.SystemRandom()
    order = [True, False] * SURE + [rng.random() < 0.5 for _ in range(DRAWN)]
    rng.shuffle(order)
    reports: dict[bool, list[TestReport]] = {True: [], False: []}
    for is_right in order:
        tree = right if is_right else faulty
        hidden = [path for path in tree if path.endswith(".py") and not is_guarded(path)]
        report = run_tests(sandbox, {**tree, TEST_FILE: code}, [TEST_FILE], limits, hidden)
        if report.kind is Kind.REFUSED or report.tampered:
            return classify(report, (), (), weights)
        if report.kind is not Kind.OK:
            return _ended(End.RUNTIME_ERROR, weights, f"{report.kind.value}: {report.message}")
        reports[is_right].append(report)
        judged = classify_test(reports[True], reports[False], weights)
        if judged is not None:  # one run is enough to refuse, and most answers are refused
            return judged
    caught = _caught(reports[True], reports[False])
    return _ended(End.RESOLVED, weights, "", len(caught))


def classify_test(right: Sequence[TestReport], faulty: Sequence[TestReport], weights: Weights) -> Judgement | None:
    """Why a written test earns nothing, from the runs on each tree so far; None while nothing speaks against it."""
    for report in right:
        results = list(report.outcomes.values())
        changed = report.outcomes != right[0].outcomes
        if not changed and (not results or "passed" not in results or "error" in results):
            return _ended(End.RUNTIME_ERROR, weights, f"no test passes on the right code: {report.message}")
        if "failed" in results or changed:
            return _ended(End.REGRESSION, weights, "a test fails on the right code, or not always passes")
    if faulty and not _caught(right, faulty):
        return _ended(End.UNRESOLVED, weights, "no test always fails on the faulty code")
    return None


def _caught(right: Sequence[TestReport], faulty: Sequence[TestReport]) -> set[str]:
    """Tests that failed in every run on the faulty tree and passed in every run on the right one."""
    failed = set.intersection(*({t for t, o in report.outcomes.items() if o == "failed"} for report in faulty))
    return failed.intersection(*({t for t, o in report.outcomes.items() if o == "passed"} for report in right))
