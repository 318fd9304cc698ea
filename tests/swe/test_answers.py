"""Whatever a model writes ends in a verdict of its own, soon: no text raises, freezes or excuses itself.

No engine is needed: the sandbox stands still here, and what it would be given is laid out for real by `Job`.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.sandbox import Job, Kind
from infra.sandbox.attacks.texts import HOSTILE
from m1.tasks import confined as confined_module
from m1.tasks.base import Row
from m1.tasks.confined import Confined, Overrun
from m1.tasks.logic import TASKS
from m1.tasks.logic.judging import score
from m1.tasks.sandbox import TestReport
from m1.tasks.swe.answers import MAX_ANSWER, apply_answer, code_of_test, fenced, make_blocks, parse_locations
from m1.tasks.swe.patches import PatchError, make_diff
from m1.tasks.swe.reward import End, judge_locations, judge_repair, judge_test
from tests.swe import mini

TASK = mini.task("double", "repair", "train")
FAULTY, RIGHT = mini.faulty("double"), mini.RIGHT
#: Of one answer, wall time; the sandbox is not counted.
SOON = 2.5


class Laying:
    """Takes the files as the real sandbox does, and says that nothing passed."""

    def run_tests(self, files, tests=None, limits=None, hidden=()) -> TestReport:
        Job(dict(files), ["true"])
        return TestReport(Kind.OK, {test: "failed" for test in tests}, 0.0, "", False)


def soon(work: Callable[[], object]) -> None:
    work()  # the reader may have been ended by the text before
    started = time.perf_counter()
    work()
    assert time.perf_counter() - started < SOON


@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_text_has_a_verdict(name: str) -> None:
    text = HOSTILE[name]

    def judge_all() -> None:
        repair = judge_repair(Laying(), TASK, FAULTY, [], text)  # type: ignore[arg-type]
        written = judge_test(Laying(), FAULTY, RIGHT, text)  # type: ignore[arg-type]
        places = judge_locations(TASK, text)
        for judged in (repair, written, places):
            assert not judged.resolved and (judged is places or judged.value == 0.0)
            judged.message.encode("utf-8")
            assert len(judged.message) <= 500 and "\n" not in judged.message

    soon(judge_all)


def test_oversized_is_an_end_of_its_own() -> None:
    text = "x" * (MAX_ANSWER + 1)
    assert judge_repair(Laying(), TASK, FAULTY, [], text).end is End.OVERSIZED  # type: ignore[arg-type]
    assert judge_test(Laying(), FAULTY, RIGHT, text).end is End.OVERSIZED  # type: ignore[arg-type]
    assert judge_locations(TASK, text).end is End.OVERSIZED


#: Pieces that mean something to a parser, and letters that mean something to an encoder.
PIECE = st.one_of(
    st.sampled_from(
        ["<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE", "```", "```python", "```diff", "--- a/mini.py",
         "+++ b/mini.py",
         "--- /dev/null", "+++ b/x/y.py", "@@ -1,3 +1,3 @@", "@@ -0,0 +1 @@", "-", "+", " ", "diff --git a/x b/y",
         "rename from mini.py", "rename to k.py", "new file mode 100644", "deleted file mode 100644", "mini.py",
         '"a\\303\\244.py"', '+++ "b/\\303.py"', "def double(x):", "    return x * x", "mini.py: double",
         "\\ No newline"]
    ),
    st.text(st.characters(), max_size=30),
    st.sampled_from(["(", "[", "\ud800", "\0", "\r", "é", "`", "-", "* ", ":", ".py"]).flatmap(
        lambda c: st.integers(1, 3000).map(lambda n: c * n)
    ),
)  # fmt: skip
TEXT = st.lists(PIECE, max_size=40).flatmap(
    lambda parts: st.sampled_from(["\n", "", "\r\n", "\n\n"]).map(lambda glue: glue.join(parts))
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_any_text_has_a_verdict(text: str) -> None:
    started = time.perf_counter()
    for judged in (
        judge_repair(Laying(), TASK, FAULTY, [], text),  # type: ignore[arg-type]
        judge_test(Laying(), FAULTY, RIGHT, text),  # type: ignore[arg-type]
        judge_locations(TASK, text),
    ):
        assert judged.value < 1.0 or judged.end is End.RESOLVED
        judged.message.encode("utf-8")
    assert time.perf_counter() - started < 3 * SOON


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_readers_of_text_raise_nothing_but_their_own_error(text: str) -> None:
    parse_locations(text)
    code_of_test(text)
    fenced(text, ("diff",))
    with contextlib.suppress(PatchError, UnicodeEncodeError):
        apply_answer(FAULTY, text)


def _rows() -> dict[str, Row]:
    return {name: task.generate(random.Random(0), 1).row(with_response=False) for name, task in TASKS.items()}


ROWS = _rows()
BLANKS = st.sampled_from(
    [" " * 4000, "\t\n" * 2000, "9" * 4000, "+" * 4000, "-" + " " * 4090 + "x", "((" * 2000, ", " * 2000]
)


@pytest.mark.parametrize("name", sorted(TASKS))
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=200), BLANKS, st.text(min_size=4090, max_size=4096)))
def test_rules_judge_any_text_at_once(name: str, text: str) -> None:
    started = time.perf_counter()
    verdict = score(ROWS[name], f"<think>x</think><answer>{text}</answer>")
    assert time.perf_counter() - started < SOON
    assert not verdict.correct or text.strip()


def test_rules_still_read_right_answers() -> None:
    for row in ROWS.values():
        assert score(row, f"<think>x</think><answer> {row.answer}\n</answer>").correct


def test_a_call_that_hangs_or_kills_its_process_is_ended_and_the_next_one_is_well() -> None:
    call = Confined(seconds=0.5)
    assert call(len, "abc") == 3
    with pytest.raises(Overrun, match=r"not read in 0\.5 s"):
        call(time.sleep, 60)
    assert call(len, "abcd") == 4
    for name in ("_exit", "kill"):
        arguments = (3,) if name == "_exit" else (0, 9)
        with pytest.raises(Overrun, match="brought down"):
            call(getattr(os, name), *arguments)
    assert call(sorted, [2, 1]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        call(divmod, 1, 0)
    call.close()
    assert call(len, "") == 0
    call.close()


def test_memory_of_a_call_is_bounded() -> None:
    call = Confined()
    with pytest.raises(MemoryError):
        call(bytes, confined_module._MEMORY + 1)
    call.close()


def test_an_answer_that_hangs_python_s_parser_is_a_bad_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m1.tasks.swe.reward.confined", lambda *_: (_ for _ in ()).throw(Overrun("not read in 2 s")))
    assert judge_repair(Laying(), TASK, FAULTY, [], make_diff(FAULTY, RIGHT)).end is End.BAD_PATCH  # type: ignore[arg-type]


def test_right_answers_are_still_read() -> None:
    for answer in (make_blocks(FAULTY, RIGHT), make_diff(FAULTY, RIGHT), f"```diff\n{make_diff(FAULTY, RIGHT)}```\n"):
        judged = judge_repair(Laying(), TASK, FAULTY, [], answer)  # type: ignore[arg-type]
        assert judged.end is End.UNRESOLVED  # it was run
        assert apply_answer(FAULTY, answer) == RIGHT
