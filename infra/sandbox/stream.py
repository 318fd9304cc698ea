"""One attached process of a container: messages in, messages and output back, everything with a deadline."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

from infra.sandbox.inside.wire import HEADER, pack

#: The engine puts stream number and length before every piece.
_PIECE = struct.Struct(">BxxxL")
OUTPUT, MESSAGES = 1, 2
#: The head of a message is a few file names, or the node ids of a test suite.
MOST_HEAD = 16 * 2**20


class Gone(Exception):
    """The process has ended, or the connection to the engine has."""


class Nonsense(Exception):
    """The process sent something that is not a message."""


class Stream:
    """A hijacked connection to the engine.

    Args:
        raw: what docker-py returns for `socket=True`; kept, since closing it would end the connection.
        messages: number of the stream that carries messages; the other one is output.
        most: bytes that one message may have.
    """

    def __init__(self, raw: Any, messages: int, most: int) -> None:
        self._raw = raw
        self._socket: socket.socket = getattr(raw, "_sock", raw)
        self._messages, self._most = messages, most
        self._pieces, self._pending = bytearray(), bytearray()
        self.output = bytearray()

    def send(self, head: dict[str, Any], seconds: float, contents: list[bytes] | None = None) -> None:
        """Send a message, and the contents of the files that its head lists.

        Raises:
            Gone, TimeoutError
        """
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(b"".join([pack(head), *(contents or [])]))
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self, deadline: float, most_output: int) -> tuple[dict[str, Any], bytes] | None:
        """The next message, or None when there is none yet and more than `most_output` bytes of output.

        Raises:
            Gone, Nonsense
            TimeoutError: nothing complete before `deadline` (of time.monotonic).
        """
        while True:
            message = self._next()
            if message is not None:
                return message
            if len(self.output) > most_output:
                return None
            self._read(deadline)

    def drain(self, deadline: float, most_output: int) -> None:
        """Read output until the process has closed it, the limit or the deadline."""
        try:
            while len(self.output) <= most_output:
                self._read(deadline)
        except (Gone, TimeoutError):
            return

    def close(self) -> None:
        self._raw.close()
        self._socket.close()

    def _read(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone(str(error)) from error
        if not data:
            raise Gone("end of stream")
        self._pieces += data
        while len(self._pieces) >= _PIECE.size:
            number, length = _PIECE.unpack_from(self._pieces)
            if len(self._pieces) < _PIECE.size + length:
                break
            piece = self._pieces[_PIECE.size : _PIECE.size + length]
            del self._pieces[: _PIECE.size + length]
            (self._pending if number == self._messages else self.output).extend(piece)

    def _next(self) -> tuple[dict[str, Any], bytes] | None:
        if len(self._pending) < HEADER.size:
            return None
        head, payload = HEADER.unpack_from(self._pending)
        if head > MOST_HEAD or payload > self._most:
            raise Nonsense(f"what is no message: {bytes(self._pending[-300:])!r}")
        end = HEADER.size + head + payload
        if len(self._pending) < end:
            return None
        text = bytes(self._pending[HEADER.size : HEADER.size + head])
        content = bytes(self._pending[HEADER.size + head : end])
        del self._pending[:end]
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Nonsense("a message that is not JSON") from error
        if not isinstance(message, dict):
            raise Nonsense("a message that is no object")
        return message, content
