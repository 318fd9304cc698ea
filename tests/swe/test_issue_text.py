"""Issue text: it says what a user sees, and no line of the patch gets into it, whatever the failure holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.tasks.swe.issue_text import LEAST_LEAK, Observation, issue, leak, observe, render
from m1.tasks.swe.mutations import mutant, mutations
from m1.tasks.swe.patches import make_diff
from m1.tasks.swe.python_source import PythonSource
from tests.swe.packages import package, tree

RIGHT = b'''def size(items):
    """Number of items.

    >>> size([1])
    1
    """
    return len(items) + offset_of(items)
'''
FAULTY = RIGHT.replace(b"+ offset_of", b"- offset_of")
GOLD = make_diff({"m.py": FAULTY}, {"m.py": RIGHT})
SHOWN = Observation("assert size([1]) == 1", "", "AssertionError", "assert 2 == 1", (), ("size", "Number of items."), 3)


def test_a_line_of_the_patch_is_found_however_it_is_written() -> None:
    assert leak("it should be `return len(items) + offset_of(items)`", GOLD)
    assert leak("return   len( items )+offset_of(\n    items)", GOLD)
    assert leak("> return len(items) - offset_of(items)", GOLD)
    assert not leak("size([1]) gives 2, Number of items. return len(items)", GOLD)


def test_every_changed_line_of_real_mutants_is_found() -> None:
    content = tree("inflection")["inflection/__init__.py"]
    source = PythonSource(content)
    checked = 0
    for mutation in random.Random(1).sample(mutations(source), 40):
        made = mutant(source, mutation)
        if made is None:
            continue
        gold = make_diff({"m.py": made}, {"m.py": content})
        added = [line[1:] for line in gold.splitlines() if line.startswith("+") and not line.startswith("+++")]
        for line in added:
            is_new = line not in made.decode().split("\n")
            if is_new and len("".join(line.split()).replace(">", "")) >= LEAST_LEAK and "  #" not in line:
                assert leak(f"some words {line.strip()} and more", gold)
                checked += 1
    assert checked > 10


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["snippet", "message", "parameters", "called"]),
    st.sampled_from([line for line in (RIGHT + FAULTY).decode().splitlines() if "return" in line]),
)
def test_no_issue_shows_the_patch(place: str, line: str) -> None:
    value = (f"size\n{line}", line) if place == "called" else f"before\n{line}\nafter"
    seen = Observation(**{**SHOWN.__dict__, place: value})
    text = issue(seen, GOLD)
    assert text is None or not leak(text, GOLD)
    assert not leak(
        issue(SHOWN, GOLD, ask=lambda prompt: f"Change it to {line} and all will be well again.") or "", GOLD
    )


def test_the_template_says_call_result_and_documentation() -> None:
    text = issue(SHOWN, GOLD)
    assert text == render(SHOWN)
    for part in (
        "`size` gives a wrong result",
        "assert size([1]) == 1",
        "assert 2 == 1",
        "> Number of items.",
        "3 other",
    ):
        assert part in text
    raised = Observation("size(None)", "{'x': 1}", "TypeError", "no len", (("m.py", 7, "size"),), ("", ""), 0)
    text = render(raised)
    for part in ("raises TypeError", 'File "m.py", line 7, in size', "TypeError: no len", "with {'x': 1}."):
        assert part in text


def test_a_models_words_are_taken_where_they_are_usable() -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "Since the update size([1]) gives 2 for me, and I would have expected 1 as documented."

    assert issue(SHOWN, GOLD, ask) == ask("") + "\n"
    assert render(SHOWN) in asked[0] and "offset_of" not in asked[0]
    assert issue(SHOWN, GOLD, lambda prompt: "") == render(SHOWN)
    assert issue(SHOWN, GOLD, lambda prompt: "x" * 100_000) == render(SHOWN)


TEST = b'''from m import size

class TestSize:
    def test_one(self, item):
        """Words."""
        items = [item]
        for extra in (1, 2):
            assert size(items + [extra]) == 2
        assert size([]) == 0
'''


@pytest.mark.parametrize(("line", "last"), [(8, "    assert size(items + [extra]) == 2"), (9, "assert size([]) == 0")])
def test_what_is_observed_ends_with_the_statement_that_failed(line: int, last: str) -> None:
    failure = {
        "exception": "AssertionError",
        "message": "at 0x7f00aa11bb22 in /work/m.py",
        "frames": [["test_m.py", line, "test_one"], ["m.py", 7, "size"]],
        "parameters": "{'item': 3}",
    }
    files = {"m.py": FAULTY, "test_m.py": TEST}
    seen = observe("test_m.py::TestSize::test_one[3]", failure, files, lambda path: path == "m.py")
    assert seen.snippet.startswith("items = [item]\n") and seen.snippet.endswith(last)
    assert seen.called[0] == "size" and seen.called[1].startswith("Number of items.")
    assert seen.message == "at 0x... in m.py"
    assert seen.frames == (("m.py", 7, "size"),)


def test_a_failure_outside_the_test_file_is_still_told() -> None:
    failure = {"exception": "ValueError", "message": "", "frames": [], "parameters": "''"}
    seen = observe("gone.py::test_x", failure, {}, package("inflection").is_code)
    assert seen.snippet == "" and "raises ValueError" in (issue(seen, GOLD) or "")
