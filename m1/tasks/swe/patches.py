"""Patches over trees of files: unified diffs, applied strictly. The forms of an answer are in `answers`.

A tree is a mapping from a relative path with forward slashes to the file's bytes. Nothing here touches the disk.

Strictly means: every context line must be there, no fuzz. A hunk goes where its header says; if its lines are not
there, it goes to the only other place after the previous hunk where they are; if there are several, it is refused.
Paths that leave the tree, links and binary patches are refused.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from m1.tasks.swe.diff_names import BadName, common_name, header_name, plain_names, whole_name, without_prefixes

Tree = dict[str, bytes]

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_NO_NEWLINE = "\\ No newline at end of file"


class PatchError(ValueError):
    """The patch is malformed, does not fit the tree, or names a path that it may not."""


# --- paths ---


def safe_path(path: str) -> str:
    """`path` itself.

    Raises:
        PatchError: it is absolute, leaves the tree, is inside `.git`, or holds characters that no source file needs.
    """
    parts = path.split("/")
    if not path or len(path) > 500 or any(ord(c) < 32 or ord(c) == 127 or c in '\\"' for c in path):
        raise PatchError(f"path {path!r} is not usable")
    if path.startswith("/") or re.match(r"^[A-Za-z]:", path) or any(part in ("", ".", "..") for part in parts):
        raise PatchError(f"path {path!r} is absolute or leaves the tree")
    if any(part.lower() == ".git" for part in parts):
        raise PatchError(f"path {path!r} is inside .git")
    return path


# --- lines ---


def split_lines(content: bytes) -> list[str]:
    """Lines with their `\\n`; a last line without one stays so. Bytes that are not UTF-8 survive the round trip."""
    return re.findall(r"[^\n]*\n|[^\n]+", content.decode("utf-8", "surrogateescape"))


def join_lines(lines: list[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")


# --- unified diffs ---


@dataclass
class Hunk:
    """Old and new lines, context included; `start` is the 1-based line of the old file that the header names."""

    start: int
    old: list[str]
    new: list[str]


@dataclass
class FileChange:
    """What a diff does to one file; `old` is None for a new file, `new` for a deleted one.

    Attributes:
        hunks: none where only the name or the mode changes, and for an empty file.
        is_copy: `old` stays.
        commit: counts the commits of an export that holds several.
    """

    old: str | None
    new: str | None
    hunks: list[Hunk] = field(default_factory=list)
    is_copy: bool = False
    commit: int = 0

    @property
    def moves(self) -> bool:
        return self.old is not None and self.new is not None and self.old != self.new


def parse_diff(text: str) -> list[FileChange]:
    """The file changes of a unified diff, in git's or in plain form, of one commit or of several one after another.

    Names are read as git writes them: quoted, with its usual prefixes, others or none; text around the diffs is not
    read. A changed mode is not kept.

    Raises:
        PatchError: no file header, a hunk that disagrees with its header, a binary patch, a link or submodule, a
            combined diff of a merge.
    """
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise PatchError("it has half of a surrogate pair, which no file can hold") from None
    try:
        return _Reader(text).read()
    except BadName as error:
        raise PatchError(str(error)) from None


class _Reader:
    """Goes through a diff line by line."""

    def __init__(self, text: str) -> None:
        self.lines: list[str] = re.findall(r"[^\n]*\n|[^\n]+", text)
        self.at = 0
        self.header: _Header | None = None
        self.changes: list[FileChange] = []
        self.commit = 0

    def read(self) -> list[FileChange]:
        while self.at < len(self.lines):
            line, following = self._line(self.at), self._line(self.at + 1)
            if line.startswith("diff --git "):
                self._close()
                self.header = _Header(line.removeprefix("diff --git "))
            elif line.startswith("--- ") and following.startswith("+++ "):
                self._file(line[4:], following[4:])
                continue
            elif line.startswith("@@ -"):
                raise PatchError(f"line {self.at + 1}: a hunk without a file header")
            elif line.startswith("GIT binary patch") or re.match(r"Binary files .* differ$", line):
                raise PatchError(f"line {self.at + 1}: binary patches are refused")
            elif line.startswith(("diff --cc ", "diff --combined ")):
                raise PatchError(
                    f"line {self.at + 1}: combined diffs of a merge are refused; give one against a parent"
                )
            elif self.header is None or not self.header.read(line):
                self._close()
                self.commit += bool(re.match("From [0-9a-f]{7,64} ", line))
            self.at += 1
        self._close()
        if not self.changes:
            raise PatchError("no file header (--- and +++ lines) found")
        return self.changes

    def _line(self, at: int) -> str:
        """Without its end; mail programs and editors may have made it that of Windows."""
        return self.lines[at].removesuffix("\n").removesuffix("\r") if at < len(self.lines) else ""

    def _close(self) -> None:
        """The end of a header behind which there are no hunks."""
        if self.header is not None and (change := self.header.alone()) is not None:
            self._add(change)
        self.header = None

    def _add(self, change: FileChange) -> None:
        change.commit = self.commit
        for path in (change.old, change.new):
            if path is not None:
                safe_path(path)
        self.changes.append(change)

    def _file(self, old: str, new: str) -> None:
        """A file with hunks; `old` and `new` as they stand behind --- and +++."""
        names = header_name(old), header_name(new)
        if names == (None, None):
            raise PatchError("a file header names /dev/null on both sides")
        change = self.header.with_hunks(*names) if self.header is not None else FileChange(*plain_names(*names))
        self.header = None
        self._add(change)
        self.at += 2
        while self.at < len(self.lines) and (match := _HUNK.match(self.lines[self.at])):
            change.hunks.append(self._hunk(match))
        if not change.hunks:
            raise PatchError(f"no hunk follows the header of {change.new or change.old}")
        line = self._line(self.at)
        if line[:1] in ("+", "-", " ") and line.strip() not in ("", "--") and not self._is_file_header():
            raise PatchError(f"line {self.at + 1}: a hunk is longer than its header says")

    def _is_file_header(self) -> bool:
        return self._line(self.at).startswith("--- ") and self._line(self.at + 1).startswith("+++ ")

    def _hunk(self, match: re.Match[str]) -> Hunk:
        old_left, new_left = (int(match[group]) if match[group] is not None else 1 for group in (2, 4))
        hunk, where = Hunk(int(match[1]), [], []), self.at + 1
        self.at += 1
        while old_left > 0 or new_left > 0:
            if self.at >= len(self.lines):
                raise PatchError(f"line {where}: the hunk is shorter than its header says")
            line = self.lines[self.at] if self.lines[self.at].endswith("\n") else self.lines[self.at] + "\n"
            self.at += 1
            sign, body = (line[0], line[1:]) if line != "\n" else (" ", "\n")
            if sign not in " +-":
                raise PatchError(f"line {self.at}: {line[:40].rstrip()!r} is not a line of a hunk")
            if self.at < len(self.lines) and self.lines[self.at].startswith("\\ "):
                body, self.at = body[:-1], self.at + 1
            if sign in " -":
                hunk.old.append(body)
                old_left -= 1
            if sign in " +":
                hunk.new.append(body)
                new_left -= 1
        if old_left or new_left:
            raise PatchError(f"line {where}: the hunk disagrees with its header")
        return hunk


class _Header:
    """The lines that git writes from `diff --git` on, before the hunks."""

    _KEYS = (
        "old mode", "new mode", "new file mode", "deleted file mode", "rename from", "rename to", "copy from",
        "copy to", "similarity index", "dissimilarity index", "index",
    )  # fmt: skip

    def __init__(self, names: str) -> None:
        self.names = names
        self.said: dict[str, str] = {}

    def read(self, line: str) -> bool:
        """Whether this is another line of the header."""
        key = next((key for key in self._KEYS if line.startswith(key + " ")), None)
        if key is None:
            return False
        value = self.said[key] = line[len(key) + 1 :]
        mode = value.partition(" ")[2] if key == "index" else value if key.endswith("mode") else ""
        if mode and not re.fullmatch("100[0-7]{3}", mode.strip()):
            raise PatchError(f"mode {mode[:20]}: links and submodules are refused")
        return True

    def _moved(self) -> FileChange | None:
        for kind in ("rename", "copy"):
            if f"{kind} from" in self.said and f"{kind} to" in self.said:
                old, new = (whole_name(self.said[f"{kind} {side}"]) for side in ("from", "to"))
                return FileChange(old, new, is_copy=kind == "copy")
        return None

    def alone(self) -> FileChange | None:
        """What it says without hunks: a move, an empty file made or removed, another mode; None if nothing."""
        if moved := self._moved():
            return moved
        if not self.said.keys() & {"new file mode", "deleted file mode", "old mode"}:
            return None
        path = common_name(self.names)
        if path is None:
            raise PatchError(f"cannot read the paths of 'diff --git {self.names[:200]}'")
        if "new file mode" in self.said:
            return FileChange(None, path)
        return FileChange(path, None if "deleted file mode" in self.said else path)

    def with_hunks(self, old: str | None, new: str | None) -> FileChange:
        """`old` and `new` are what stands behind --- and +++; None for /dev/null."""
        if moved := self._moved():
            return moved
        if old is not None and new is not None:
            both = old if old == new else without_prefixes(old, new)  # git writes another prefix on each side, or none
            if both:
                return FileChange(both, both)
        elif path := common_name(self.names):
            return FileChange(old and path, new and path)
        return FileChange(*plain_names(old, new))


# --- applying ---


def apply_diff(tree: Mapping[str, bytes], text: str) -> Tree:
    """A new tree with the diff applied; the given one is left as it is.

    Raises:
        PatchError: see the head of this module.
    """
    result = dict(tree)
    for _, changes in itertools.groupby(parse_diff(text), lambda change: change.commit):
        _apply_commit(result, list(changes))
    return result


def _apply_commit(tree: Tree, changes: list[FileChange]) -> None:
    """Apply the changes of one commit in place. As with git, moves and copies speak of the files before all of them."""
    before = dict(tree)
    leaving = {change.old for change in changes if change.new is None or (change.moves and not change.is_copy)}
    for change in changes:
        old, new = change.old, change.new
        source = before if change.moves else tree
        if old is not None and old not in source:
            raise PatchError(f"{old} does not exist")
        after = _apply_hunks(split_lines(source[old]) if old is not None else [], change)
        if old is not None and (new is None or (change.moves and not change.is_copy)) and old in leaving:
            leaving.remove(old)
            del tree[old]
        if new is None:
            if after:
                raise PatchError(f"{old}: deleted, but lines remain")
            continue
        if new != old and new in tree and new not in leaving:
            raise PatchError(f"{new} exists already")
        if new != old:
            leaving.discard(new)  # what was there has made room already
        tree[new] = join_lines(after)
    for change in changes:
        if change.new is not None and change.new != change.old and change.new in tree:
            no_clash(tree, change.new)


def _apply_hunks(lines: list[str], change: FileChange) -> list[str]:
    name = change.old or change.new
    result: list[str] = []
    done = 0
    finder = _Finder(lines)
    for hunk in change.hunks:
        if not hunk.old and lines:
            raise PatchError(f"{name}: a hunk without context cannot be placed")
        place = _place(finder, hunk, done, str(name))
        result += lines[done:place] + hunk.new
        done = place + len(hunk.old)
    result += lines[done:]
    if any(not line.endswith("\n") for line in result[:-1]):
        raise PatchError(f"{name}: a line without newline is not the last")
    return result


def _place(finder: _Finder, hunk: Hunk, done: int, name: str) -> int:
    """Index of the first line that the hunk replaces."""
    size = len(hunk.old)
    stated = hunk.start - 1 if size else hunk.start
    if stated >= done and finder.lines[stated : stated + size] == hunk.old:
        return stated
    places = finder.places(hunk.old, done)
    if len(places) == 1:
        return places[0]
    found = "fits 2 places or more" if places else "does not fit"
    raise PatchError(f"{name}: the hunk at line {hunk.start} {found}")


class _Finder:
    """Where lines stand in a file, found in time linear in the file whatever is in it."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    @functools.cached_property
    def _text(self) -> str:
        return "\n" + "".join(self.lines)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Of every line, the place of the line feed before it."""
        return [0, *itertools.accumulate(map(len, self.lines))]

    def places(self, part: list[str], start: int) -> list[int]:
        """The first two indices, `start` or later, at which the lines of `part` stand."""
        if not part or any(not line.endswith("\n") for line in part[:-1]):
            return []
        wanted = "\n" + "".join(part)
        if not part[-1].endswith("\n"):  # only at the end of the file
            at = len(self.lines) - len(part)
            return [at] if at >= start and self._text.endswith(wanted) else []
        found: list[int] = []
        at = self._text.find(wanted, self._starts[start])
        while at >= 0 and len(found) < 2:
            found.append(bisect.bisect_left(self._starts, at))
            at = self._text.find(wanted, at + 1)
        return found


def no_clash(tree: Mapping[str, bytes], path: str) -> None:
    """A file cannot be where a folder is, nor below another file."""
    parents = path.split("/")[:-1]
    if any("/".join(parents[: n + 1]) in tree for n in range(len(parents))):
        raise PatchError(f"{path}: a parent of it is a file")
    if any(other.startswith(path + "/") for other in tree):
        raise PatchError(f"{path}: it is a folder")


def make_diff(old: Mapping[str, bytes], new: Mapping[str, bytes], context: int = 3) -> str:
    """Unified diff in git's form from `old` to `new`, paths in order; empty if they are equal."""
    parts: list[str] = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) == new.get(path):
            continue
        safe_path(path)
        before, after = split_lines(old.get(path, b"")), split_lines(new.get(path, b""))
        parts.append(f"diff --git a/{path} b/{path}\n")
        if path not in old:
            parts.append("new file mode 100644\n")
        if path not in new:
            parts.append("deleted file mode 100644\n")
        end = "\t" if " " in path else ""  # as git ends a name with blanks
        names = (f"a/{path}{end}" if path in old else "/dev/null", f"b/{path}{end}" if path in new else "/dev/null")
        for line in difflib.unified_diff(before, after, *names, n=context, lineterm="\n"):
            parts.append(line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}\n")
    return "".join(parts)
