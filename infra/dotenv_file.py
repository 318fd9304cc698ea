"""Our block of variables in the user's `.env`; all other bytes of the file stay as they are.

python-dotenv's `set_key` cannot do that: it turns CRLF into LF, ends the last line, fails at bytes that are not UTF-8,
and does not escape `${`, which its parser expands. So only that parser is used here, to check that all is read back.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Container, Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from m1.errors import ServiceError

BEGIN, END = "# m1 up: begin (rewritten at every start)", "# m1 up: end"
_MARKERS = _BEGIN, _END = BEGIN.encode(), END.encode()
_AGAIN = (
    "Correct that, then run `m1 up` again; until then, plain `prefect` and `mlflow` commands do not find the services."
)


def write_block(path: Path, variables: Mapping[str, str | None]) -> bool:
    """Make the block hold these variables, and say whether the file was changed; without any, there is no block.

    A file that ended without a line break still does. It is replaced at once, with mode, owner and attributes of the
    old one; where `path` is a symlink, its target is.

    Args:
        path: the file; made if there is none and something to write.
        variables: None leaves a variable out. It should be named all the same: where one of the two marker lines is
            gone, only lines of these variables count as ours.

    Raises:
        ServiceError: the file cannot be read or written, or readers would not find the variables in it.
    """
    target = Path(os.path.realpath(path))
    try:
        old = _status(target)
        before = target.read_bytes() if old else b""
        after = _with_block(before, variables, path)
        if after == before:
            return False
        if old and not os.access(target, os.W_OK):  # its folder's permissions alone would let us replace it
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _replace(target, after, old)
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror or error}", _AGAIN) from error
    return True


def _status(target: Path) -> os.stat_result | None:
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):  # a pipe of a password manager, say
        raise OSError(errno.EINVAL, "it is a device or a pipe")
    return status


def _with_block(content: bytes, variables: Mapping[str, str | None], path: Path) -> bytes:
    given = {name: value for name, value in variables.items() if value is not None}
    if given and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ServiceError(f"{path} is UTF-16, which no reader of such files knows", f"Save it as UTF-8. {_AGAIN}")
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    lines = content.removeprefix(mark).splitlines(keepends=True)
    line_end = b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"
    above, below = _around_block(lines, variables)
    if not given:
        return mark + above + below
    written = [BEGIN, *(f'{name}="{_escaped(value)}"' for name, value in given.items()), END]
    try:
        block = line_end.join(line.encode() for line in written)
    except UnicodeEncodeError as error:  # a folder's name as the system gives it
        raise ServiceError(f"{path}: {error.object!r} is not UTF-8", f"Rename the folder. {_AGAIN}") from None
    if above and not above.endswith((b"\n", b"\r")):
        above += line_end  # and none behind the block: `_around_block` knows by this that it is ours
    else:
        block += line_end
    _check(above + block, given, path)
    return mark + above + block + below


def _around_block(lines: list[bytes], names: Container[str]) -> tuple[bytes, bytes]:
    """The user's bytes above and below our block, or above the place for it.

    Where a marker line is gone, nobody knows where the block ends, and only lines of `names` next to the other marker
    are left out: the rest may be the user's.
    """
    marks = [line.strip() if line.strip() in _MARKERS else b"" for line in lines]
    kept: list[bytes] = []
    place: int | None = None
    at = 0
    while at < len(lines):
        if not marks[at]:
            kept.append(lines[at])
            at += 1
            continue
        if marks[at] == _END:
            while kept and _name(kept[-1]) in names:
                kept.pop()
        place = len(kept) if place is None else min(place, len(kept))
        end = next((number for number in range(at + 1, len(lines)) if marks[number]), None)
        if marks[at] == _BEGIN and end is not None and marks[end] == _END:
            at = end
            if kept and not lines[end].endswith((b"\n", b"\r")):
                kept[-1] = re.sub(rb"(\r\n|\r|\n)\Z", b"", kept[-1])
        elif marks[at] == _BEGIN:
            while at + 1 < len(lines) and _name(lines[at + 1]) in names:
                at += 1
        at += 1
    place = len(kept) if place is None else place
    return b"".join(kept[:place]), b"".join(kept[place:])


def _name(line: bytes) -> str:
    return line.partition(b"=")[0].decode(errors="replace")


def _unexpanded(value: str) -> str:
    """The value for python-dotenv, which puts variables in place of `${name}`, in quotes too, and knows no escape.

    `${:-$}` is a variable without a name, which is never set, and so its default: the dollar sign.
    """
    return value.replace("${", "${:-$}{")


def _escaped(value: str) -> str:
    text = _unexpanded(value)
    for character, escape in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(character, escape)
    return text


def _check(content: bytes, given: Mapping[str, str], path: Path) -> None:
    text = io.StringIO(content.decode(errors="replace"), newline=None)
    read = {binding.key: binding.value for binding in parse_stream(text)}
    for name, value in given.items():
        if read.get(name) != _unexpanded(value):
            raise ServiceError(
                f"{path}: {name} cannot be read back; a quote above the line `{BEGIN}` may lack its end",
                f"Close the quote. {_AGAIN}",
            )


def _replace(target: Path, content: bytes, old: os.stat_result | None) -> None:
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        # What may be secret is closed to others until the copy is as closed as the original.
        with open(os.open(temporary, flags, 0o600 if old else 0o666), "wb") as file:
            if old:
                for user in (old.st_uid, -1):  # only root gives files away; a group of its own, any user
                    with contextlib.suppress(OSError):
                        os.chown(temporary, user, old.st_gid)
                        break
                shutil.copystat(target, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
