"""Messages between the runner and its two programs in the container, and files laid into the work area.

A message is two lengths (4 bytes each, big-endian), a JSON object, and a payload. This text is put in front of both
programs, and imported by the runner.
"""

import json
import os
import stat
import struct

HEADER = struct.Struct(">II")


def read_exactly(fd: int, size: int) -> bytes:
    """Raises:
    EOFError: the other side is gone.
    """
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def pack(head: dict, payload: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return HEADER.pack(len(text), len(payload)) + text + payload


def receive(fd: int) -> dict:
    """The head of the next message; its payload is left to `lay`."""
    length, _ = HEADER.unpack(read_exactly(fd, HEADER.size))
    return json.loads(read_exactly(fd, length))


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def lay(source: int, files: list, folder: str, mode: int) -> None:
    """Write `files`, pairs of path and size whose contents follow on `source`, below `folder`.

    Existing files are not overwritten and no symlink is followed. `mode` is that of the folders made: in a sticky one
    (0o1777) everybody may make files, and nobody but the owner can rename or remove one.
    """
    for path, size in files:
        below = folder
        for part in path.split("/")[:-1]:
            below = below + "/" + part
            try:
                os.mkdir(below)
                os.chmod(below, mode)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(below).st_mode):
                    raise
        first = read_exactly(source, min(size, 2))
        fd = os.open(folder + "/" + path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            write_all(fd, first)
            for start in range(len(first), size, 1 << 20):
                write_all(fd, read_exactly(source, min(size - start, 1 << 20)))
            os.fchmod(fd, 0o755 if first == b"#!" else 0o644)
        finally:
            os.close(fd)
