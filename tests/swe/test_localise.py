"""Localisation: scores by overlap, ranking, what is shown of a large tree, and how a model's answers are read."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from m1.tasks.swe.answers import apply_blocks
from m1.tasks.swe.localise import (
    Ranked,
    _bm25,
    cut,
    localise,
    overlap,
    parse_files,
    parse_locations,
    pieces,
    rank_files,
    skeleton,
    words,
)
from m1.tasks.swe.prompts import question
from m1.tasks.swe.python_source import MODULE
from m1.tasks.swe.tasks import SweTask
from tests.swe.packages import package, tree

LOCATIONS = st.sets(st.tuples(st.sampled_from(["a.py", "b.py", "c.py"]), st.sampled_from(["f", "g", "A.f", MODULE])))


@settings(deadline=None)
@given(LOCATIONS, LOCATIONS)
def test_overlap_is_one_only_for_the_right_places(answer: set, truth: set) -> None:
    score = overlap(answer, truth)
    assert 0.0 <= score <= 1.0
    assert (score == 1.0) == (answer == truth and bool(truth))
    assert score == overlap(truth, answer)
    if not {path for path, _ in answer} & {path for path, _ in truth}:
        assert score == 0.0


def test_overlap_by_hand() -> None:
    assert overlap([("a.py", "f")], [("a.py", "g")]) == 0.5  # right file, wrong element
    assert overlap([("a.py", "f"), ("b.py", "g")], [("a.py", "f")]) == 2 / 3


def test_bm25_is_the_published_formula() -> None:
    documents = [Counter("aba"), Counter("b"), Counter("cccc")]
    k, b, mean = 1.2, 0.75, 8 / 3
    weight = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    expected = weight * 2 * (k + 1) / (2 + k * (1 - b + b * 3 / mean))
    assert _bm25(["a", "a"], documents) == [expected, 0.0, 0.0]


def test_words_are_identifiers_and_their_parts() -> None:
    assert words("CamelCase.to_snake(x2)") == ["camelcase", "camel", "case", "to_snake", "to", "snake", "x2", "x", "2"]


def test_a_file_and_function_that_the_issue_names_come_first() -> None:
    cachetools = package("cachetools")
    files = tree("cachetools")
    issue = "`methodkey` gives a wrong result: keys.methodkey(self, 1) is not equal to itself"
    assert rank_files(issue, files, cachetools.is_code)[0].path == "src/cachetools/keys.py"
    ranked = localise(issue, files, cachetools.is_code, window=1000, count=len)
    assert (ranked[0].path, ranked[0].element) == ("src/cachetools/keys.py", "methodkey")


def test_the_pieces_of_a_file_hold_every_line_once() -> None:
    for path, content in tree("cachetools").items():
        if package("cachetools").is_code(path):
            lines = [line for _, text in pieces(content) for line in text.split("\n")]
            assert sorted(lines) == sorted(content.decode().split("\n"))


@settings(max_examples=6, deadline=None)
@given(st.integers(10, 20_000), st.randoms(use_true_random=False))
def test_what_is_shown_fits_the_window_and_is_the_files_own_text(window: int, generator) -> None:
    files = {path: c for path, c in tree("cachetools").items() if package("cachetools").is_code(path)}
    ranked = [Ranked(path, name, 0.0) for path, content in files.items() for name, _ in pieces(content)]
    generator.shuffle(ranked)
    text = cut(files, ranked, window, len)
    assert len(text) <= window
    for section in text.split("### ")[1:]:
        path, _, rest = section.partition("\n")
        lines = files[path].decode().split("\n")
        position = 0
        for line in rest.removeprefix("```python\n").rstrip("`\n").split("\n"):
            if line != "...":
                position = lines.index(line, position) + 1


def test_search_blocks_can_be_copied_from_what_is_shown() -> None:
    files = tree("cachetools")
    text = cut(files, [Ranked("src/cachetools/keys.py", "methodkey", 1.0)], 5000, len)
    body = text.split("```python\n")[1].split("\n```")[0].removeprefix("...\n").removesuffix("\n...")
    block = f"src/cachetools/keys.py\n<<<<<<< SEARCH\n{body}\n=======\n{body}  # x\n>>>>>>> REPLACE\n"
    assert apply_blocks(files, block) != files


def test_a_skeleton_has_every_signature_and_no_body() -> None:
    content = (
        b"class A(B):\n    '''Doc.\n\n    More.'''\n    x = 1\n    def f(self,\n          a=1):\n        return 2\n"
    )
    assert skeleton(content) == 'class A(B):\n    """Doc."""\n    def f(self, a=1):'


def test_both_stages_ask_the_model_and_keep_what_it_leaves_out() -> None:
    files, is_code = tree("cachetools"), package("cachetools").is_code
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) == 1:
            return "- `src/cachetools/func.py`\nsrc/gone.py\ntests/test_lru.py\n"
        return "src/cachetools/func.py: lru_cache\n"

    ranked = localise("words about nothing", files, is_code, window=100_000, count=len, ask=ask)
    assert (ranked[0].path, ranked[0].element) == ("src/cachetools/func.py", "lru_cache")
    assert len(prompts) == 2 and "def lru_cache" in prompts[1] and "src/cachetools/keys.py" in prompts[0]
    assert len({(item.path, item.element) for item in ranked}) == len(ranked) > 5


def test_answers_are_read_line_by_line() -> None:
    answer = "I think:\n- `a/b.py: A.f`\na/b.py::A.f\n* c.py\nd.txt: f\na/b.py: g()\nx y.py: f g\n"
    assert parse_locations(answer) == [("a/b.py", "A.f"), ("c.py", MODULE), ("a/b.py", "g")]
    assert parse_files("`a.py`\nb.py\na.py\n", {"a.py": b""}) == ["a.py"]


@settings(max_examples=4, deadline=None)
@given(st.sampled_from(["repair", "localise", "write-test"]), st.integers(1500, 30_000))
def test_the_question_fits_the_window_and_holds_the_issue(kind: str, window: int) -> None:
    files, issue = tree("cachetools"), "`methodkey` gives a wrong result\n"
    task = SweTask(
        id="x", kind=kind, bug="x", source="cachetools", base="0", licence="MIT", split="train", environment="default",
        origin="mutation", issue=issue, gold_patch="", locations=(),
    )  # fmt: skip
    text = question(task, files, package("cachetools").is_code, window=window, count=len)
    assert len(text) <= window and issue in text
