"""The one way in which YAML that people write is read: profiles, specs, params.yaml, values of `--set`."""

from __future__ import annotations

import codecs
import copy
import re
import stat
from pathlib import Path
from typing import Any

from m1.config import yaml_text
from m1.config.faults import describe as describe
from m1.config.faults import shorten
from m1.errors import UsageError

MAX_BYTES = 1_000_000


def read_yaml(path: Path) -> dict[str, object]:
    """Fields of a file. No two of them share an object, whatever aliases the file has.

    Raises:
        UsageError: the file cannot be read, is too large or not UTF-8, is not YAML, no mapping or more than one
            document, gives a field twice, or has a word that the versions of YAML read differently.
    """
    content = yaml_text.parse(_decode(_read(path), path), str(path), with_lines=True)
    if isinstance(content, dict):
        return content
    found = "no content" if content is None else "list" if isinstance(content, list) else shorten(content)
    raise UsageError(f"{path}: expected a mapping, found {found}", "Write lines of the form `field: value`.")


def parse_value(text: str, what: str) -> object:
    """A value given in YAML, for example on the command line; nothing at all is null. `what` names it in errors.

    Raises:
        UsageError: as for `read_yaml`.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{what[:200]}...: longer than {MAX_BYTES} characters", "Write it into a file.")
    return yaml_text.parse(text, what, with_lines="\n" in text)


def override(content: dict[str, Any], dotted: str, value: object, source: str) -> None:
    """Set a field of `content`, as `read_yaml` returns it; `source` names the content in errors.

    Sections that are missing are made, so that validation finds misspelt ones. A number selects an item of a list.

    Raises:
        UsageError: a part of the way is no section, or the list has no such item.
    """
    *parents, last = dotted.split(".")
    place: Any = content
    if "" in (*parents, last):
        raise UsageError(f"{source}: override {dotted!r}: a part of the name is empty", "Write section.field=value.")
    for depth, part in enumerate((*parents, last)):
        key: int | str = part
        if isinstance(place, list):
            key = _index(place, dotted, depth, source)
        elif not isinstance(place, dict):
            above = ".".join(dotted.split(".")[:depth])
            raise UsageError(
                f"{source}: override {dotted}: {above} is not a section (value {shorten(place)})",
                f"Write section.field=value, or give {above} a whole section.",
            )
        if depth == len(parents):
            place[key] = copy.deepcopy(value)  # the caller may give the same object to another field
        else:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]


def _index(items: list[Any], dotted: str, depth: int, source: str) -> int:
    part, above = dotted.split(".")[depth], ".".join(dotted.split(".")[:depth])
    if re.fullmatch("0|[1-9][0-9]{0,8}", part) and int(part) < len(items):
        return int(part)
    have = f"its items are 0 to {len(items) - 1}" if items else "it is empty"
    raise UsageError(
        f"{source}: override {dotted}: the list {above} has no item {part}, {have}",
        f"Write the number of an item, or give {above} a whole list.",
    )


# --- files ---


def _read(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe could be silent for ever
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise UsageError(f"{path}: not a file but {kind}", "Name a YAML file.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"no file {path}", "Check the name.") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(f"{str(path)!r}: cannot be read: {reason}", "Check the name and the permissions.") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES} bytes", "Name a YAML file that a person wrote.")
    return data


def _decode(data: bytes, path: Path) -> str:
    wide = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if data.startswith(wide) or data.count(0) * 3 > len(data):  # every second byte of Latin text in UTF-16 is 0
        bits = 32 if data.startswith(wide[:2]) else 16
        raise UsageError(f"{path}, line 1: not UTF-8; it looks like UTF-{bits}", "Save it as UTF-8.")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02X}); "
            "it looks like Latin-1 or Windows-1252",
            "Save it as UTF-8.",
        ) from None
