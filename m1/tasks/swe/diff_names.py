"""Names of files as git writes them into a diff: quoted, with one prefix or another, or none."""

from __future__ import annotations

import re


class BadName(ValueError):
    """A name that git would not write so."""


_ESCAPES = {"a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, '"': 34, "\\": 92}
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\([0-3][0-7]{2}|.)")
#: git's own: diff.mnemonicPrefix gives commits, the index and the work tree letters.
_PREFIXES = ("a", "b", "c", "i", "o", "w")
_LONGEST_NAMES = 2_200


def _unquoted(match: re.Match[str]) -> str:
    """A name in double quotes, with C's escapes and bytes in octal."""
    parts, last = [], 0
    for escape in _ESCAPED.finditer(match[1]):
        parts.append(match[1][last : escape.start()].encode("utf-8", "surrogateescape"))
        code = escape[1]
        if len(code) == 1 and code not in _ESCAPES:
            raise BadName(f"the name {match[0][:200]} has an escape that git does not write")
        parts.append(bytes([int(code, 8) if len(code) == 3 else _ESCAPES[code]]))
        last = escape.end()
    parts.append(match[1][last:].encode("utf-8", "surrogateescape"))
    try:
        return b"".join(parts).decode("utf-8")
    except UnicodeDecodeError:
        raise BadName(f"the name {match[0][:200]} is not UTF-8") from None


def whole_name(text: str) -> str:
    """A name that has the rest of its line for itself."""
    quoted = _QUOTED.fullmatch(text)
    return _unquoted(quoted) if quoted else text


def header_name(text: str) -> str | None:
    """The name behind --- or +++, None for /dev/null; a tab ends it, behind which plain diffs have the time."""
    if quoted := _QUOTED.match(text):
        return _unquoted(quoted)
    name = text.partition("\t")[0] if "\t" in text else text.rstrip()
    return None if name == "/dev/null" else name


def common_name(names: str) -> str | None:
    """The file that both names of a `diff --git` line are of; None where they cannot be told apart.

    git separates them by a blank, and they may have blanks themselves.
    """
    if len(names) > _LONGEST_NAMES:
        return None
    pairs: list[tuple[str, str]] = []
    if first := _QUOTED.match(names):
        pairs = [(_unquoted(first), whole_name(names[first.end() + 1 :]))]
    elif names.endswith('"'):
        blank = names.find(' "')
        pairs = [(names[:blank], whole_name(names[blank + 1 :]))]
    else:
        pairs = [(names[:at], names[at + 1 :]) for at, letter in enumerate(names) if letter == " "]
    found = {old if old == new else without_prefixes(old, new) for old, new in pairs} - {""}
    return found.pop() if len(found) == 1 else None


def without_prefixes(old: str, new: str) -> str:
    """The path of two names of one file with different prefixes, whichever they are; empty if they are of two files."""
    (first, _, path), (second, _, other) = old.partition("/"), new.partition("/")
    return path if path == other and first != second else ""


def plain_names(old: str | None, new: str | None) -> tuple[str | None, str | None]:
    """Names of a diff that is not git's, or of one whose own line says nothing."""
    if old is not None and new is not None:
        if path := without_prefixes(old, new):
            return path, path
        (first, _, old_path), (second, _, new_path) = old.partition("/"), new.partition("/")
        if first in _PREFIXES and second in _PREFIXES and first != second:
            return old_path, new_path
        if old == new and first in ("a", "b"):
            return old_path, new_path
    return old and old.removeprefix("a/"), new and new.removeprefix("b/")
