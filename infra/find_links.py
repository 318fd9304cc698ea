"""Folders of wheels that pip on this machine knows, for uv, which does not read pip's settings.

Prints them in the form of the variable UV_FIND_LINKS. A folder that does not exist is left out: uv would stop at it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys


def find_links() -> list[str]:
    """Locations from PIP_FIND_LINKS and pip's configuration files, without duplicates."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    ).stdout
    values = [os.environ.get("UV_FIND_LINKS", "").replace(",", " "), os.environ.get("PIP_FIND_LINKS", "")]
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        if key.rpartition(".")[2] == "find-links":
            values.append(str(ast.literal_eval(value)))
    found = dict.fromkeys(place for value in values for place in value.split())
    return [place for place in found if "://" in place or os.path.isdir(place)]


if __name__ == "__main__":
    print(",".join(find_links()))
