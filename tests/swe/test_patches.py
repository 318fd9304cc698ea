"""Patches: what is made applies and gives the same bytes, git agrees, and whatever is not exact is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.tasks.swe.answers import apply_answer, apply_blocks, make_blocks, parse_blocks
from m1.tasks.swe.patches import PatchError, apply_diff, make_diff, parse_diff, safe_path

LINES = st.sampled_from(
    ["a\n", "b\n", "c\n", "\n", "    x = 1\n", "é\r\n", "+plus\n", "-minus\n", "@@ -1 +1 @@\n", "--- a/x\n"]
)
ENDS = st.sampled_from([b"", b"end", b"\xff\xfe"])
CONTENT = st.builds(lambda lines, end: "".join(lines).encode() + end, st.lists(LINES, max_size=25), ENDS)
PATHS = st.sampled_from(["a.py", "src/b.py", "src/deep/c d.txt", "ä.py"])
TREES = st.dictionaries(PATHS, CONTENT, max_size=4)


def on_disk(folder: Path, tree: dict[str, bytes]) -> None:
    for path, content in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def from_disk(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def git_apply(folder: Path, tree: dict[str, bytes], patch: str) -> dict[str, bytes] | None:
    """What git makes of it, None if it refuses."""
    on_disk(folder, tree)
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"],
        cwd=folder,
        input=patch.encode("utf-8", "surrogateescape"),
        capture_output=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "GIT_CEILING_DIRECTORIES": str(folder.parent), "HOME": str(folder.parent)},
    )
    return None if done.returncode else from_disk(folder)


@settings(max_examples=60, deadline=None)
@given(TREES, TREES)
def test_a_diff_leads_from_one_tree_to_the_other_and_back(old: dict[str, bytes], new: dict[str, bytes]) -> None:
    before = dict(old)
    for start, end in ((old, new), (new, old)):
        diff = make_diff(start, end)
        assert bool(diff) == (start != end)
        if diff:
            assert apply_diff(start, diff) == end
    assert old == before


@settings(max_examples=15, deadline=None)
@given(TREES, TREES)
def test_git_reads_our_diffs_in_the_same_way(tmp_path_factory, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    diff = make_diff(old, new)
    if diff:
        assert git_apply(tmp_path_factory.mktemp("tree"), old, diff) == new


@settings(max_examples=20, deadline=None)
@given(st.lists(LINES, min_size=4, max_size=20), st.data())
def test_on_a_file_that_moved_on_we_do_what_git_does_or_refuse(tmp_path_factory, lines: list[str], data) -> None:
    old = {"f.py": "".join(lines).encode()}
    at = data.draw(st.integers(0, len(lines) - 1))
    new = {"f.py": "".join([*lines[:at], "changed\n", *lines[at + 1 :]]).encode()}
    diff = make_diff(old, new)
    shift = data.draw(st.lists(LINES, max_size=5))
    moved = {"f.py": "".join([*shift, *lines, *data.draw(st.lists(LINES, max_size=5))]).encode()}
    try:
        ours = apply_diff(moved, diff)
    except PatchError:
        return
    theirs = git_apply(tmp_path_factory.mktemp("moved"), moved, diff)
    # git pins a hunk that has no context before or after to the start or the end of the file; then it refuses.
    assert theirs is None or ours == theirs


@settings(max_examples=60, deadline=None)
@given(TREES, TREES)
def test_blocks_lead_from_one_tree_to_the_other_or_are_refused(old: dict[str, bytes], new: dict[str, bytes]) -> None:
    try:
        text = make_blocks(old, new)
    except PatchError:
        return
    if old != new:
        assert apply_blocks(old, text) == new
        assert apply_answer(old, "Some words before.\n\n" + text) == new


def test_blocks_exist_for_ordinary_changes() -> None:
    old = {"m.py": b"def f():\n    return 1\n\n\ndef g():\n    return 1\n"}
    new = {"m.py": b"def f():\n    return 1\n\n\ndef g():\n    return 2\n", "n.py": b"x = 1\n"}
    text = make_blocks(old, new)
    assert apply_blocks(old, text) == new
    assert "### m.py" in text and "### n.py" in text


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.py", "a/../../x.py", "a//b.py", "./a.py", ".git/config", "a/.GIT/hooks/x", "C:/x.py",
             "a\\b.py", "a\x00b", "a\x01b", "", "a/", "~\x7f"],
)  # fmt: skip
def test_paths_that_leave_the_tree_are_refused(path: str) -> None:
    with pytest.raises(PatchError):
        safe_path(path)
    with pytest.raises(PatchError):
        apply_diff({"a.py": b"x\n"}, f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+x\n")
    with pytest.raises(PatchError):
        apply_blocks({"a.py": b"x\n"}, f"{path}\n<<<<<<< SEARCH\n=======\nx\n>>>>>>> REPLACE\n")


HEAD = "--- a/m.py\n+++ b/m.py\n"


@pytest.mark.parametrize(
    ("diff", "reason"),
    [
        ("", "no file header"),
        ("just words", "no file header"),
        ("@@ -1 +1 @@\n-a\n+b\n", "without a file header"),
        (HEAD, "no hunk"),
        (HEAD + "@@ -1,2 +1,2 @@\n-a\n+b\n", "shorter"),
        (HEAD + "@@ -1 +1 @@\n-a\n+b\n+c\n", "longer"),
        (HEAD + "@@ -1 +1 @@\n-wrong\n+b\n", "does not fit"),
        (HEAD + "@@ -9 +9 @@\n-same\n+b\n", "fits 2 places"),
        (HEAD + "@@ -2,0 +3 @@\n+b\n", "without context"),
        (HEAD + "@@ -1 +1 @@\n*a\n", "not a line of a hunk"),
        ("--- a/gone.py\n+++ b/gone.py\n@@ -1 +1 @@\n-a\n+b\n", "does not exist"),
        ("--- /dev/null\n+++ b/m.py\n@@ -0,0 +1 @@\n+b\n", "exists already"),
        ("--- /dev/null\n+++ b/m.py/x.py\n@@ -0,0 +1 @@\n+b\n", "is a file"),
        ("--- a/m.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n", "lines remain"),
        ("--- /dev/null\n+++ /dev/null\n@@ -1 +1 @@\n-a\n+b\n", "both sides"),
        ("diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n", "mode 120000"),
        ("diff --git a/s b/s\nnew file mode 160000\n", "mode 160000"),
        ("diff --git a/b b/b\nindex 1..2\nGIT binary patch\n", "binary"),
        ("diff --cc m.py\nindex 1,2..3\n--- a/m.py\n+++ b/m.py\n@@@ -1,1 -1,1 +1,1 @@@\n- a\n -b\n++c\n", "combined"),
        ("diff --git a/m.py b/../k.py\nrename from m.py\nrename to ../k.py\n", "leaves the tree"),
    ],
)
def test_what_is_not_exact_is_refused(diff: str, reason: str) -> None:
    with pytest.raises(PatchError, match=reason):
        apply_diff({"m.py": b"a\nsame\nsame\n"}, diff)


def test_gits_extras_are_read() -> None:
    tree = {"m.py": b"a\nb\n", "old.py": b"one\ntwo\nthree\n", "empty.py": b""}
    diff = (
        "From 0123 Mon Sep 17 00:00:00 2001\nSubject: words\n---\n m.py | 2 +-\n\n"
        "diff --git a/m.py b/m.py\nindex 0..1 100644\n--- a/m.py\n+++ b/m.py\n@@ -1,2 +1,2 @@ def f():\n a\n-b\n+c\n"
        "diff --git a/old.py b/new.py\nsimilarity index 66%\nrename from old.py\nrename to new.py\n"
        "--- a/old.py\n+++ b/new.py\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n"
        "diff --git a/empty.py b/empty.py\ndeleted file mode 100644\nindex 0..1\n"
        "-- \n2.39.2\n"
    )
    assert apply_diff(tree, diff) == {"m.py": b"a\nc\n", "new.py": b"one\n2\nthree\n"}
    assert [change.new for change in parse_diff(diff)] == ["m.py", "new.py", None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("words", "no block"),
        ("m.py\n<<<<<<< SEARCH\na\n=======\nb\n", "has no >>>>>>> REPLACE"),
        ("m.py\n<<<<<<< SEARCH\na\n>>>>>>> REPLACE\n", "0 dividers"),
        ("m.py\n<<<<<<< SEARCH\na\n=======\nb\n=======\n>>>>>>> REPLACE\n", "2 dividers"),
        ("<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n", "no path"),
        ("m.py\n<<<<<<< SEARCH\nmissing\n=======\nb\n>>>>>>> REPLACE\n", "found 0 times"),
        ("m.py\n<<<<<<< SEARCH\nsame\n=======\nb\n>>>>>>> REPLACE\n", "found 2 times"),
        ("m.py\n<<<<<<< SEARCH\n=======\nb\n>>>>>>> REPLACE\n", "exists already"),
        ("k.py\n<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n", "does not exist"),
        ("m.py\n<<<<<<< SEARCH\n a\n=======\nb\n>>>>>>> REPLACE\n", "found 0 times"),
    ],
)
def test_blocks_that_are_not_exact_are_refused(text: str, reason: str) -> None:
    with pytest.raises(PatchError, match=reason):
        apply_blocks({"m.py": b"a\nsame\nsame\n"}, text)


def test_fences_and_headings_around_blocks() -> None:
    text = "First:\n\n### m.py\n```python\n<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n```\nThen\n\n`k.py`\n"
    text += "<<<<<<< SEARCH\n=======\nnew\n>>>>>>> REPLACE\n"
    assert [block.path for block in parse_blocks(text)] == ["m.py", "k.py"]
    assert apply_answer({"m.py": b"a\n"}, text) == {"m.py": b"b\n", "k.py": b"new\n"}
    fenced = f"Here:\n```diff\n{HEAD}@@ -1 +1 @@\n-a\n+b\n```\nDone.\n"
    assert apply_answer({"m.py": b"a\n"}, fenced) == {"m.py": b"b\n"}
