"""Printing for people."""

from __future__ import annotations

import os
import sys

from rich.console import Console, RenderableType

#: A pipe has no width of its own; cut cells would help nobody.
PIPE_WIDTH = 200


def show(content: RenderableType) -> None:
    """Print a table or a text to standard output."""
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH).print(content)
