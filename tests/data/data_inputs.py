"""Builders of small inputs for the tests of the data stages."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import Any


def local_source(name: str = "notes", **changes: Any) -> dict[str, Any]:
    """A source of the text files in the folder `texts` of the checkout."""
    source = {
        "name": name,
        "kind": "local",
        "path": "texts",
        "licence": "CC0-1.0",
        "licence_files": ["LICENCE"],
        "domain": "prose",
        "weight": 1.0,
        "format": "text",
        "include": ["**.txt"],
    }
    return source | changes


def write_texts(checkout: Path, texts: dict[str, str | bytes]) -> None:
    """Fill the folder of `local_source`."""
    folder = checkout / "texts"
    folder.mkdir(exist_ok=True)
    (folder / "LICENCE").write_text("Do as you like.\n")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def make_sdist(folder: Path, package: str, version: str, files: dict[str, str]) -> str:
    """Write `<package>-<version>.tar.gz` and return its SHA-256."""
    path = folder / f"{package}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{package}-{version}/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sentences(seed: int, count: int) -> str:
    """English-like text, different for every seed, that passes the quality filters."""
    draw = random.Random(seed)
    nouns = ["river", "stone", "garden", "window", "teacher", "letter", "market", "engine", "forest", "winter", "table"]
    verbs = ["carries", "follows", "leaves", "watches", "repairs", "remembers", "crosses", "builds", "measures"]
    lines = []
    for _ in range(count):
        first, second, third = draw.sample(nouns, 3)
        lines.append(
            f"The {first} of number {draw.randrange(10**6)} {draw.choice(verbs)} the {second} and the {third}."
        )
    return "\n".join(lines) + "\n"
