"""The files that a complete stage leaves in its run folder, and whether they are still there as it left them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from m1.data.content import hash_of

#: Bytes up to which the files of a run are hashed; of larger runs the sizes alone are compared.
HASHED = 256 * 10**6


class OutputFile(BaseModel):
    """One file: its size in bytes, and its SHA-256 in hex digits unless the run is too large for that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str = ""


def note(run: Path, files: Iterator[Path] | list[Path]) -> dict[str, OutputFile]:
    """Path relative to the run folder -> what is compared later."""
    found = {path.relative_to(run).as_posix(): path for path in files if path.is_file()}
    sizes = {name: found[name].stat().st_size for name in sorted(found)}
    hashed = sum(sizes.values()) <= HASHED
    return {
        name: OutputFile(size=size, sha256=hash_of(run / name, "sha256") if hashed else "")
        for name, size in sizes.items()
    }


def fault_of(run: Path, files: Mapping[str, OutputFile]) -> str | None:
    """What is missing or changed, in a few words; None if nothing is."""
    faults = [f"{name} {fault}" for name, file in files.items() if (fault := _fault(run / name, file))]
    return ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "") if faults else None


def _fault(path: Path, file: OutputFile) -> str:
    if not path.is_file():
        return "is gone"
    same = path.stat().st_size == file.size and (not file.sha256 or hash_of(path, "sha256") == file.sha256)
    return "" if same else "has changed"
