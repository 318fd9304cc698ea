"""Output for people that no terminal, pipe or locale can refuse."""

from __future__ import annotations

import codecs
import sys

_HANDLER = "m1.readable"
_ASCII = {
    "≤": "<=", "≥": ">=", "→": "->", "←": "<-", "×": "x", "·": "*", "…": "...", "–": "-", "—": "-", "−": "-",
    "±": "+-", "≈": "~", "’": "'", "‘": "'", "“": '"', "”": '"', "é": "e", "µ": "u",
}  # fmt: skip


def make_readable() -> None:
    """From here on, what the encoding of standard output or error cannot say is printed in its place in ASCII."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a library has put something else there
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end
