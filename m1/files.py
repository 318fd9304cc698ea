"""Files that are there completely or not at all, and files of one JSON object a line.

Whatever a stage or a service leaves behind is written beside its place and renamed once it is complete: a reader never
sees half a file, and a crash leaves the earlier one.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from m1.errors import UsageError


@contextlib.contextmanager
def unfinished(final: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """A path beside `final` to write a file or folder to; it takes the place of `final` when the block ends well.

    What the block has written is removed when it raises. The parent folder is made if need be.

    Args:
        sole_writer: nobody else writes `final` at this time: what killed writers have left beside it is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if sole_writer:
        for leftover in final.parent.glob(f".{glob.escape(final.name)}.[0-9]*"):
            remove(leftover)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and final.exists():
            remove(final)
        os.replace(temporary, final)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, its content on the disk before it has its name."""
    with unfinished(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_rows(path: Path, rows: Iterable[Any], *, sort_keys: bool = False) -> int:
    """Write one JSON value a line, atomically; returns how many."""
    lines = [json.dumps(row, sort_keys=sort_keys) + "\n" for row in rows]
    write_text(path, "".join(lines))
    return len(lines)


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, cut at line feeds alone: JSON strings may hold every other line separator."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_rows(path: Path, hint: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line.

    Args:
        hint: how to make the file again.

    Raises:
        UsageError: the file is missing, or a line of it is not a JSON object.
    """
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise UsageError(f"{path} is not there", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number} is damaged: {error}", hint) from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is damaged: not a JSON object", hint)
        rows.append(row)
    return rows
