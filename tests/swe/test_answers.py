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


def block(path: str, search: str = "", replace: str = "x = 1\n") -> str:
    return f"{path}\n<<<<<<< SEARCH\n{search}=======\n{replace}>>>>>>> REPLACE\n"


def new_file(path: str, content: str = "x = 1\n") -> str:
    lines = content.count("\n")
    return f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{lines} @@\n" + "".join(
        f"+{line}\n" for line in content.split("\n")[:lines]
    )


HOSTILE: dict[str, str] = {
    "nothing": "",
    "white space": " \n\t\r\n" * 1000,
    "a file named as the sandbox's own folder": block(".m1"),
    "a file in the sandbox's own folder": block(".m1/test_x.py"),
    "a name of 300 characters": block("a" * 300 + ".py"),
    "a name of 300 bytes": new_file("ä" * 150 + ".py"),
    "a path of 75,000 folders": block("a/" * 75_000 + "b.py"),
    "a path of 200 folders": new_file("a/" * 200 + "b.py"),
    "75,000 new files": "".join(block(f"a/{n}") for n in range(3_400)),
    "thousands of new files as a diff": "".join(new_file(f"d{n}/e/f.py") for n in range(2_000)),
    "three fences and 60,000 newlines": "```\n```\n```" + "\n" * 60_000,
    "three words of fences and 60,000 newlines": "```diff\n```diff\n```diff" + "\n" * 60_000 + "x",
    "200,000 dashes": "-" * 200_000,
    "200,000 dashes and a word": "-" * 199_990 + "a.py:",
    "200,000 backquotes": "`" * 200_000,
    "40,000 opening fences": "```python\n" * 20_000,
    "40,000 bare fences": "```\n" * 40_000,
    "spaces before a bracket": " " * 199_000 + "(",
    "200,000 spaces between path and colon": "a.py" + " " * 190_000 + "x",
    "lone surrogates": block("a.py", "", "x = '\ud800'\n"),
    "a lone surrogate in a path": new_file("a\udcff.py"),
    "NUL bytes": block("a.py", "", "x = '\0'\n"),
    "a NUL in a path": new_file("a\0.py"),
    "a huge integer": block("a.py", "", "x = " + "9" * 150_000 + "\n"),
    "a huge number in a hunk": "--- a/mini.py\n+++ b/mini.py\n@@ -" + "9" * 10_000 + " +1 @@\n-a\n+b\n",
    "a long number in a hunk's count": "--- a/mini.py\n+++ b/mini.py\n@@ -1," + "9" * 3_000 + " +1 @@\n-a\n+b\n",
    "deep brackets": block("a.py", "", "x = " + "(" * 90_000 + ")" * 90_000 + "\n"),
    "deep unclosed brackets": block("a.py", "", "x = " + "([{" * 30_000 + "\n"),
    "deep f-strings": block("a.py", "", "x = " + 'f"{' * 20_000 + "\n"),
    "deep blocks": block("a.py", "", "".join(" " * n + "if 1:\n" for n in range(500)) + "\n"),
    "long chains": block("a.py", "", "x = " + "-" * 150_000 + "1\n"),
    "long attribute chains": block("a.py", "", "x = a" + ".b" * 90_000 + "\n"),
    "many nots": block("a.py", "", "x = " + "not " * 45_000 + "1\n"),
    "lambdas": block("a.py", "", "x = " + "lambda: " * 20_000 + "1\n"),
    "a bracket puzzle": block("a.py", "", "f" + "(x for x in " * 4_000 + "\n"),
    "absolute path": block("/etc/passwd"),
    "path out of the tree": new_file("../../x.py"),
    "a link": "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc/passwd\n",
    "names that differ in case": block("Mini.py") + block("MINI.PY"),
    "a file where a folder is": block("mini.py/x.py"),
    "a folder in place of the tests": new_file("test_mini.py/x.py"),
    "carriage returns": block("a.py", "", "x = 1\r\n") .replace("\n", "\r\n"),
    "carriage returns alone": "\r" * 100_000,
    "line separators": "\u2028\u2029\x85\x0b\x0c" * 20_000,
    "a byte order mark": "\ufeff" + block("a.py", "", "\ufeffx = 1\n"),
    "a coding of its own": block("a.py", "", "# -*- coding: utf-7 -*-\n+AHgAPQAx-\n"),
    "one hunk many times": "--- a/mini.py\n+++ b/mini.py\n" + "@@ -1 +1 @@\n-a\n+b\n" * 9_000,
    "a header of 200,000 characters": "diff --git a/" + " b/" * 60_000 + "\nnew file mode 100644\n",
    "a rename of 190,000 characters": "diff --git a/x b/y\nrename from " + "a/" * 95_000 + "\nrename to b\n",
    "blocks without an end": "m.py\n<<<<<<< SEARCH\n" * 9_000,
    "dividers": "m.py\n<<<<<<< SEARCH\n" + "=======\n" * 20_000 + ">>>>>>> REPLACE\n",
    "a search of empty lines": block("mini.py", "\n" * 100_000, "x\n"),
    "an oversized text": "x = 1\n" * 100_000,
    "a file of Python's own": block("unittest.py") + block("src/random/__init__.py"),
}  # fmt: skip


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
