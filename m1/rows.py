"""JSON that others wrote, read one row at a time: a bad row costs that row, and its reason is kept.

For files of this project's own making, where a damaged line is an error, see `m1.files`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m1.errors import UsageError

LINES = (".jsonl", ".ndjson")
MAX_DEPTH = 100
_MOST_DIGITS = 400
_SURROGATE = re.compile("[\ud800-\udfff]")
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Reject:
    """A row that is not used. `id` is the row's own name, or its place in the file."""

    id: str
    reason: str


@dataclass
class Rows:
    """What a file holds.

    Attributes:
        good: (place in the file, row).
        rejected: the others.
        named: the file is an object whose names are the places.
    """

    good: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    named: bool = False


def read_objects(path: Path) -> Rows:
    """The JSON objects of a file: one a line (.jsonl, .ndjson), or else a list, or an object of objects.

    Raises:
        UsageError: the file cannot be read, is not in UTF-8, or no row of it can be read.
    """
    by_line = path.suffix in LINES
    content = None if by_line else _whole(path)
    rows = Rows(named=isinstance(content, dict))
    for place, value in _by_line(path) if by_line else _parts(content, path):
        if isinstance(value, Reject):
            rows.rejected.append(value)
        else:
            rows.good.append((place, value))
    require_any(path, len(rows.good), rows.rejected)
    return rows


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """The lines of a .jsonl file with their numbers from 1, one after the other; blank ones are left out.

    Raises:
        UsageError: the file cannot be read, or is not in UTF-8.
    """
    try:
        with open(path, "rb") as file:  # binary files are cut at line feeds alone
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = _unmarked(line, path)
                if line.strip():
                    yield number, _line(line, f"{path.name}:{number}")
    except OSError as error:
        raise _unreadable(path, error) from error


def require_any(what: Path | str, good: int, rejected: Iterable[Reject], where: str = "") -> None:
    """Refuse a source of which nothing is left.

    Raises:
        UsageError: no good row; the first reason is named, and `where` the others are kept.
    """
    rejected = list(rejected)
    if good:
        return
    if not rejected:
        raise UsageError(f"{what} holds no rows", "Name a file with content.")
    raise UsageError(
        f"{what}: none of its {len(rejected)} rows can be used; the first, {rejected[0].id}: {rejected[0].reason}",
        f"All reasons are in {where}." if where else "Correct the file.",
    )


def summary(rejected: Iterable[Reject], where: Path) -> str:
    """One line for people: how many rows were not used, the commonest reason, and the file with all of them."""
    reasons = Counter(reject.reason for reject in rejected)
    if not reasons:
        return ""
    most, count = reasons.most_common(1)[0]
    number = sum(reasons.values())
    said = most if number == count else f"{count} of them: {most}"
    return f"{number} {'row' if number == 1 else 'rows'} not used ({said[:200]}); reasons in {where}"


def parse(text: str) -> Any:
    """A JSON value as every reader would understand it.

    Raises:
        ValueError: not JSON, a name given twice, a number that is not finite or has hundreds of digits, half of a
            surrogate pair, or nested deeper than `MAX_DEPTH`; the message says which.
    """
    value = _load(text)
    if fault := _fault(value):
        raise ValueError(fault)
    return value


def read_json(path: Path) -> Any:
    """The JSON value of a whole file.

    Raises:
        UsageError: the file cannot be read, or `parse` refuses what it holds.
    """
    try:
        return parse(_text(path))
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "Correct the file, or fetch or make it again.") from error


def shown(value: object) -> str:
    """A value in a message: short, on one line, and printable everywhere."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- inside ---


class _Twice(dict[str, Any]):
    """An object in which a name is given twice; `name` is the first such."""

    name = ""


def _by_line(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    for number, value in objects(path):
        yield f"{path.name}:{number}", value


def _whole(path: Path) -> list[Any] | dict[str, Any]:
    try:
        content = _load(_text(path))
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "Correct the file; one object a line goes in a .jsonl file.") from error
    if isinstance(content, _Twice):
        raise UsageError(f"{path}: {shown(content.name)} is given twice", "Correct the file.")
    if not isinstance(content, (list, dict)):
        raise UsageError(f"{path}: expected a list of objects, found {shown(content)}", "Correct the file.")
    return content


def _parts(content: Any, path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    named = content.items() if isinstance(content, dict) else ((f"{path.name}[{i}]", v) for i, v in enumerate(content))
    for place, value in named:
        yield place, _checked(value, place)


def _line(line: bytes, place: str) -> dict[str, Any] | Reject:
    try:
        value = _load(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Reject(place, "not UTF-8")
    except ValueError as error:
        return Reject(place, str(error))
    return _checked(value, place)


def _checked(value: Any, place: str) -> dict[str, Any] | Reject:
    if not isinstance(value, dict):
        return Reject(place, f"not a JSON object but {shown(value)}")
    fault = _fault(value)
    return Reject(place, fault) if fault else value


def _text(path: Path) -> str:
    """Bytes that are not UTF-8 become lone surrogates, which `_fault` finds in the row that has them."""
    try:
        return _unmarked(path.read_bytes(), path).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unmarked(data: bytes, path: Path) -> bytes:
    """Without the byte order mark of UTF-8.

    Raises:
        UsageError: it is UTF-16 or UTF-32, as PowerShell writes.
    """
    head = data[:4096]
    if head.startswith(_WIDE) or head.count(0) * 3 > len(head):
        bits = 32 if head.startswith(_WIDE[:2]) else 16
        raise UsageError(f"{path}: not UTF-8; it looks like UTF-{bits}", "Save it as UTF-8.")
    return data.removeprefix(codecs.BOM_UTF8)


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read {path}: {error.strerror or error}", "Check the name and the permissions.")


def _load(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    twice = _Twice(made)
    counts = Counter(name for name, _ in pairs)
    twice.name = next(name for name, count in counts.items() if count > 1)
    return twice


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else math.inf


def _fault(value: Any) -> str:
    """What is wrong with a value that the parser took; empty if nothing is."""
    waiting = [(value, 1)]
    while waiting:
        at, depth = waiting.pop()
        if isinstance(at, str):
            if not at.isascii() and _SURROGATE.search(at):
                return "half of a surrogate pair, or bytes that are not UTF-8, in its text"
        elif isinstance(at, float):
            if not math.isfinite(at):
                return "a number that is not finite or too large"
        elif isinstance(at, (dict, list)):
            if depth > MAX_DEPTH:
                return f"nested more than {MAX_DEPTH} deep"
            if isinstance(at, _Twice):
                return f"{shown(at.name)} is given twice"
            if isinstance(at, dict):
                waiting += ((name, depth) for name in at)
                at = list(at.values())
            waiting += ((part, depth + 1) for part in at)
    return ""
