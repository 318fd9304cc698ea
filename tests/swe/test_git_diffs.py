"""Diffs as git writes them, read as git reads them: random histories, git's own output, and git's own result."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.tasks.swe.patches import PatchError, apply_diff, parse_diff

ENVIRONMENT = {
    "PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}  # fmt: skip

LINES = st.sampled_from(
    [b"a\n", b"b\n", b"c\n", b"\n", b"    x = 1\n", b"\xc3\xa9\r\n", b"+plus\n", b"-minus\n", b"@@ -1 +1 @@\n",
     b"--- a/x\n", b"+++ b/x\n", b"diff --git a/x b/x\n", b"-- \n",
     b"From 0123456789012345678901234567890123456789 Mon\n",
     b"\r\n", b"rename from x\n", b"\xe2\x80\xa8x\n", b"\xff\n", b"\\ No newline\n"]
)  # fmt: skip
CONTENT = st.builds(
    lambda lines, end: b"".join(lines) + end, st.lists(LINES, max_size=25), st.sampled_from([b"", b"end", b"end\r"])
)
PATHS = st.sampled_from(
    ["a.py", "src/b.py", "src/deep/c d.txt", "\u00e4.py", "a/x.py", "b/x.py", "b/a/x.py", "x b/x", "w/i/o.py",
     "\u65e5\u672c/\u8a9e \u00e9.py", "end ", "- a", "dev/null", "x -> y"]
)  # fmt: skip
TREES = st.dictionaries(PATHS, CONTENT, max_size=5)
FORMS = st.sampled_from(
    [
        [],
        ["-M"],
        ["-M30%"],
        ["-C", "--find-copies-harder"],
        ["-B", "-M"],
        ["--no-prefix"],
        ["--no-prefix", "-M"],
        ["--src-prefix=old/", "--dst-prefix=brand-new/"],
        ["-U0", "--inter-hunk-context=0"],
        ["-U12", "--full-index"],
        ["--patch-with-stat", "--summary", "-C"],
    ]
)
SETTINGS = st.lists(
    st.sampled_from(["core.quotePath=false", "diff.mnemonicPrefix=true", "diff.suppressBlankEmpty=true"]), unique=True
)


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "-b", "main", ".")

    def git(self, *arguments: str, text: bytes = b"") -> bytes:
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, input=text, capture_output=True, env=ENVIRONMENT, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commit(self, tree: dict[str, bytes]) -> str:
        for file in sorted(self.folder.rglob("*"), reverse=True):
            if ".git" not in file.parts:
                file.rmdir() if file.is_dir() else file.unlink()
        write(self.folder, tree)
        self.git("add", "-A", "-f")
        self.git("commit", "-q", "--allow-empty", "-m", "title\n\nwords --- and\n+++ more\n-- \nwords")
        return self.git("rev-parse", "HEAD").decode().strip()

    def diff(self, config: list[str], *arguments: str) -> str:
        options = [part for each in config for part in ("-c", each)]
        return self.git(*options, *arguments).decode("utf-8", "surrogateescape")


def write(folder: Path, tree: dict[str, bytes]) -> None:
    for path, content in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def applied_by_git(folder: Path, tree: dict[str, bytes], diff: str, *options: str) -> dict[str, bytes] | None:
    folder.mkdir()
    write(folder, tree)
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", *options, "-"],
        cwd=folder,
        input=diff.encode("utf-8", "surrogateescape"),
        capture_output=True,
        env={**ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        check=False,
    )
    if done.returncode:
        return None
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def possible(tree: dict[str, bytes]) -> bool:
    """No file where a folder is."""
    return not any(other.startswith(path + "/") for path in tree for other in tree)


@settings(max_examples=120, deadline=None)
@given(TREES.filter(possible), TREES.filter(possible), FORMS, SETTINGS)
def test_a_diff_of_git_leads_from_one_commit_to_the_next(tmp_path_factory, old, new, form, config) -> None:
    folder = tmp_path_factory.mktemp("history")
    checkout = Checkout(folder)
    first, second = checkout.commit(old), checkout.commit(new)
    diff = checkout.diff(config, "diff", *form, first, second)
    if old == new:
        return
    if form[:1] == ["-U0"]:  # without context git itself refuses to place what is added
        theirs = applied_by_git(folder / "there", old, diff)
        try:
            assert apply_diff(old, diff) == new
        except PatchError as error:
            assert "without context" in str(error) or "fits 2 places" in str(error) or theirs is None
        return
    assert apply_diff(old, diff) == new
    level = ["-p0"] if "--no-prefix" in form else []
    theirs = applied_by_git(folder / "there", old, diff, *level)
    assert theirs == new or theirs is None, "git and we agree"


@settings(max_examples=40, deadline=None)
@given(st.lists(TREES.filter(possible), min_size=3, max_size=4), st.sampled_from([[], ["-C", "--find-copies-harder"]]))
def test_several_commits_in_one_export(tmp_path_factory, trees, form) -> None:
    checkout = Checkout(tmp_path_factory.mktemp("history"))
    commits = [checkout.commit(tree) for tree in trees]
    export = checkout.diff([], "format-patch", "--stdout", "--always", *form, f"{commits[0]}..{commits[-1]}")
    if all(tree == trees[0] for tree in trees):
        with pytest.raises(PatchError):
            apply_diff(trees[0], export)
    else:
        assert apply_diff(trees[0], export) == trees[-1]


def test_a_file_moved_in_one_commit_and_changed_in_the_next(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    lines = "".join(f"line {n}\n" for n in range(20)).encode()
    trees = [
        {"m.py": lines, "k.py": b"k\n"},
        {"m.py": lines.replace(b"line 3\n", b"three\n"), "k.py": b"k\n"},
        {"n.py": lines.replace(b"line 3\n", b"three\n"), "k.py": b"k\n", "copy.py": b"k\n"},
        {"n.py": lines.replace(b"line 3\n", b"3\n").replace(b"line 9\n", b""), "copy.py": b"k\nmore\n"},
    ]
    commits = [checkout.commit(tree) for tree in trees]
    export = checkout.diff([], "format-patch", "--stdout", "-C", "--find-copies-harder", f"{commits[0]}..")
    assert "rename from m.py" in export and "copy from k.py" in export
    assert apply_diff(trees[0], export) == trees[-1]
    assert [change.commit for change in parse_diff(export)] == [1, 2, 2, 3, 3, 3]
    shown = checkout.diff([], "show", "-C", "HEAD")  # with an indented message in front
    assert apply_diff(trees[2], shown) == trees[3]


def test_modes_alone_and_files_without_content(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    tree = {"run me.py": b"x\n", "empty \u00e4": b"", "full": b"y\n"}
    first = checkout.commit(tree)
    (tmp_path / "run me.py").chmod(0o755)
    (tmp_path / "empty \u00e4").unlink()
    (tmp_path / "new \u00e9").touch()
    checkout.git("add", "-A")
    for form in ([], ["--no-prefix"]):
        diff = checkout.diff([], "diff", "--cached", *form, first)
        assert "old mode" in diff
        assert apply_diff(tree, diff) == {"run me.py": b"x\n", "new \u00e9": b"", "full": b"y\n"}
    with pytest.raises(PatchError, match="does not exist"):
        apply_diff({"full": b"y\n"}, diff)


def test_what_no_text_can_say_is_refused(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    first = checkout.commit({"b.bin": b"\0\1", "l": b"x\n"})
    second = checkout.commit({"b.bin": b"\0\2", "l": b"x\n"})
    for form in ([], ["--binary"]):
        with pytest.raises(PatchError, match="binary patches are refused"):
            apply_diff({"b.bin": b"\0\1", "l": b"x\n"}, checkout.diff([], "diff", *form, first, second))
    (tmp_path / "l").unlink()
    (tmp_path / "l").symlink_to("b.bin")
    checkout.git("add", "-A")
    with pytest.raises(PatchError, match="mode 120000"):
        apply_diff({"b.bin": b"\0\2", "l": b"x\n"}, checkout.diff([], "diff", "--cached"))
    for name in ('quo"te.py', "back\\slash.py", "ta\tb.py", "bell\a.py"):
        (tmp_path / name).write_text("x\n")
        checkout.git("add", "-N", name)
        with pytest.raises(PatchError, match="is not usable"):
            parse_diff(checkout.diff([], "diff", "--", name))


MERGE = "diff --cc m.py\nindex 1,2..3\n--- a/m.py\n+++ b/m.py\n@@@ -1,1 -1,1 +1,1 @@@\n- a\n -b\n++c\n"


@pytest.mark.parametrize(
    ("diff", "reason"),
    [
        (MERGE, "combined diffs"),
        ('--- "a/\\377.py"\n+++ "b/\\377.py"\n@@ -1 +1 @@\n-a\n+b\n', "is not UTF-8"),
        ('--- "a/\\q.py"\n+++ "b/\\q.py"\n@@ -1 +1 @@\n-a\n+b\n', "escape that git does not write"),
        ('--- "a/\\056\\056/x.py"\n+++ "b/\\056\\056/x.py"\n@@ -1 +1 @@\n-a\n+b\n', "leaves the tree"),
        ('--- "a/.git\\057config"\n+++ "b/.git\\057config"\n@@ -1 +1 @@\n-a\n+b\n', "inside .git"),
        ('diff --git "a/\\056\\056/x.py" "b/\\056\\056/x.py"\nnew file mode 100644\n', "leaves the tree"),
        ("diff --git a/x b/y\nnew file mode 100644\n", "cannot read the paths"),
        ("diff --git a/x b/x\nnew file mode 120000\r\n", "mode 120000"),
        ("diff --git a/x b/x\nindex 12..34 120000\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "mode 120000"),
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+\ud800\n", "surrogate"),
        ("diff --git a/x b/x\nold mode 100644\nnew mode 160000\n", "mode 160000"),
    ],
)
def test_what_cannot_be_applied_has_a_reason(diff: str, reason: str) -> None:
    with pytest.raises(PatchError, match=reason):
        apply_diff({"x": b"a\n", "m.py": b"a\n"}, diff)


def test_windows_line_ends_in_a_whole_diff() -> None:
    diff = "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n".replace("\n", "\r\n")
    assert apply_diff({"x.py": b"a\r\n"}, diff) == {"x.py": b"b\r\n"}
    with pytest.raises(PatchError, match="does not fit"):  # git says so, too
        apply_diff({"x.py": b"a\n"}, diff)


def test_files_that_change_places() -> None:
    move = "diff --git a/{0} b/{1}\nsimilarity index 100%\nrename from {0}\nrename to {1}\n"
    swapped = apply_diff({"x": b"1\n", "y": b"2\n"}, move.format("x", "y") + move.format("y", "x"))
    assert swapped == {"y": b"1\n", "x": b"2\n"}
    into = move.format("x", "x/y")
    assert apply_diff({"x": b"1\n"}, into) == {"x/y": b"1\n"}
    with pytest.raises(PatchError, match="exists already"):
        apply_diff({"x": b"1\n", "y": b"2\n"}, move.format("x", "y"))
    with pytest.raises(PatchError, match="is a file"):
        apply_diff({"x": b"1\n", "y": b"2\n"}, move.format("x", "y/x"))


@pytest.mark.parametrize("count", [1000, 64_000])
def test_hunks_are_placed_in_time_linear_in_the_file(count: int) -> None:
    """Equal lines, and long hunks that fit nowhere: what is tried place by place takes minutes at this size."""
    tree = {"x.py": b"a\n" * count}
    hunk = f"@@ -{count},{count // 2} +{count},{count // 2 - 1} @@\n" + " a\n" * (count // 2 - 1) + "-b\n"
    with pytest.raises(PatchError, match="does not fit"):
        apply_diff(tree, "--- a/x.py\n+++ b/x.py\n" + hunk)
    with pytest.raises(PatchError, match="fits 2 places"):
        apply_diff(tree, "--- a/x.py\n+++ b/x.py\n" + hunk.replace("-b", "-a"))
