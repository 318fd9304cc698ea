"""Patches over trees of files: unified diffs, applied strictly. The forms of an answer are in `answers`.

A tree is a mapping from a relative path with forward slashes to the file's bytes. Nothing here touches the disk.

Strictly means: every context line must be there, no fuzz. A hunk goes where its header says; if its lines are not
there, it goes to the only other place after the previous hunk where they are; if there are several, it is refused.
Paths that leave the tree, links and binary patches are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """What a diff does to one file; `old` is None for a new file, `new` for a deleted one."""

    old: str | None
    new: str | None
    hunks: list[Hunk] = field(default_factory=list)


def parse_diff(text: str) -> list[FileChange]:
    """The file changes of a unified diff, in git's or in plain form.

    Raises:
        PatchError: no file header, a hunk that disagrees with its header, a binary patch, a link or submodule.
    """
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    changes: list[FileChange] = []
    header: dict[str, str] = {}
    position = 0
    while position < len(lines):
        line = lines[position].rstrip("\n")
        following = lines[position + 1].rstrip("\n") if position + 1 < len(lines) else ""
        if line.startswith("diff --git "):
            _close(header, changes)
            header = {"git": line}
        elif line.startswith("--- ") and following.startswith("+++ "):
            change = FileChange(_header_path(line[4:], "a/"), _header_path(following[4:], "b/"))
            if change.old is None and change.new is None:
                raise PatchError("a file header names /dev/null on both sides")
            header = {}
            changes.append(change)
            position = _parse_hunks(lines, position + 2, change)
            continue
        elif line.startswith("@@ -"):
            raise PatchError(f"line {position + 1}: a hunk without a file header")
        elif line.startswith(("GIT binary patch", "Binary files ")):
            raise PatchError(f"line {position + 1}: binary patches are refused")
        elif header:
            _read_git_line(line, header)
        elif changes and line[:1] in ("+", "-", " ") and line not in ("-- ", "--") and line.strip():
            raise PatchError(f"line {position + 1}: a hunk is longer than its header says")
        position += 1
    _close(header, changes)
    if not changes:
        raise PatchError("no file header (--- and +++ lines) found")
    return changes


def _read_git_line(line: str, header: dict[str, str]) -> None:
    mode = re.match(r"^(?:new file mode|deleted file mode|old mode|new mode) (\d+)$", line)
    if mode and mode[1] not in ("100644", "100755"):
        raise PatchError(f"mode {mode[1]}: links and submodules are refused")
    for key in ("rename from", "rename to", "copy from", "copy to", "new file mode", "deleted file mode"):
        if line.startswith(key + " "):
            header[key] = line[len(key) + 1 :]


def _close(header: dict[str, str], changes: list[FileChange]) -> None:
    """Changes that git writes without hunks: a rename, an empty file made or removed."""
    if "rename from" in header and "rename to" in header:
        changes.append(FileChange(safe_path(header["rename from"]), safe_path(header["rename to"])))
    elif "copy from" in header:
        raise PatchError("copies are refused; write the new file in full")
    elif "new file mode" in header or "deleted file mode" in header:
        match = re.match(r"^diff --git a/(.+) b/\1$", header["git"])
        if match is None:
            raise PatchError(f"cannot read the paths of {header['git']!r}")
        path = safe_path(match[1])
        changes.append(FileChange(None, path) if "new file mode" in header else FileChange(path, None))


def _header_path(text: str, prefix: str) -> str | None:
    path = text.split("\t")[0].rstrip()
    if path == "/dev/null":
        return None
    return safe_path(path.removeprefix(prefix))


def _parse_hunks(lines: list[str], position: int, change: FileChange) -> int:
    """Read the hunks that follow a file header; returns the index of the first line after them."""
    while position < len(lines) and (match := _HUNK.match(lines[position])):
        old_left, new_left = (int(match[group]) if match[group] is not None else 1 for group in (2, 4))
        hunk = Hunk(int(match[1]), [], [])
        where = position + 1
        position += 1
        while old_left > 0 or new_left > 0:
            if position >= len(lines):
                raise PatchError(f"line {where}: the hunk is shorter than its header says")
            line = lines[position] if lines[position].endswith("\n") else lines[position] + "\n"
            position += 1
            sign, body = (line[0], line[1:]) if line != "\n" else (" ", "\n")
            if sign not in " +-":
                raise PatchError(f"line {position}: {line[:40].rstrip()!r} is not a line of a hunk")
            if position < len(lines) and lines[position].startswith("\\ "):
                body, position = body[:-1], position + 1
            if sign in " -":
                hunk.old.append(body)
                old_left -= 1
            if sign in " +":
                hunk.new.append(body)
                new_left -= 1
        if old_left or new_left:
            raise PatchError(f"line {where}: the hunk disagrees with its header")
        change.hunks.append(hunk)
    if not change.hunks:
        raise PatchError(f"no hunk follows the header of {change.new or change.old}")
    return position


def apply_diff(tree: Mapping[str, bytes], text: str) -> Tree:
    """A new tree with the diff applied; the given one is left as it is.

    Raises:
        PatchError: see the head of this module.
    """
    result = dict(tree)
    for change in parse_diff(text):
        if change.old is None:
            before: list[str] = []
            if change.new in result:
                raise PatchError(f"{change.new} exists already")
        elif change.old not in result:
            raise PatchError(f"{change.old} does not exist")
        else:
            before = split_lines(result[change.old])
        after = _apply_hunks(before, change)
        if change.old is not None:
            del result[change.old]
        if change.new is None:
            if after:
                raise PatchError(f"{change.old}: deleted, but lines remain")
            continue
        if change.new in result:
            raise PatchError(f"{change.new} exists already")
        no_clash(result, change.new)
        result[change.new] = join_lines(after)
    return result


def _apply_hunks(lines: list[str], change: FileChange) -> list[str]:
    name = change.old or change.new
    result: list[str] = []
    done = 0
    for hunk in change.hunks:
        if not hunk.old and lines:
            raise PatchError(f"{name}: a hunk without context cannot be placed")
        place = _place(lines, hunk, done, str(name))
        result += lines[done:place] + hunk.new
        done = place + len(hunk.old)
    result += lines[done:]
    if any(not line.endswith("\n") for line in result[:-1]):
        raise PatchError(f"{name}: a line without newline is not the last")
    return result


def _place(lines: list[str], hunk: Hunk, done: int, name: str) -> int:
    """Index of the first line that the hunk replaces."""
    size = len(hunk.old)
    stated = hunk.start - 1 if size else hunk.start
    if stated >= done and lines[stated : stated + size] == hunk.old:
        return stated
    places = [at for at in range(done, len(lines) - size + 1) if lines[at : at + size] == hunk.old]
    if len(places) == 1:
        return places[0]
    found = f"fits {len(places)} places" if places else "does not fit"
    raise PatchError(f"{name}: the hunk at line {hunk.start} {found}")


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
        names = (f"a/{path}" if path in old else "/dev/null", f"b/{path}" if path in new else "/dev/null")
        for line in difflib.unified_diff(before, after, *names, n=context, lineterm="\n"):
            parts.append(line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}\n")
    return "".join(parts)
