"""Whether the files of a data set are still those that dvc.lock records.

DVC's own look goes by size and time; a byte that flipped on the disk, or a file put back with its old time, passes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from m1 import paths
from m1.data import lock
from m1.errors import UsageError
from m1.files import write_json

#: Bytes up to which a data set is read in whole at every look. Of a larger one, those files are read whose size, time
#: or inode is another than when they were read last.
READ_WHOLE = 256 * 10**6

GONE = "it is gone"

#: File, relative -> its size in bytes, time in nanoseconds and inode.
Stats = tuple[tuple[str, tuple[int, int, int]], ...]


def verify(stage: str, profile_name: str) -> None:
    """Refuse a data set that is not what dvc.lock records; one without a record is not looked at.

    Raises:
        UsageError: it is gone or damaged; names the file where that is known.
    """
    entry = lock.entry(stage, profile_name)
    if entry is None or (fault := fault_of(entry)) is None:
        return
    raise UsageError(
        f"the data set {stage} of profile {profile_name} is not the one that dvc.lock records: {fault}",
        f"`rm -r {entry.path}; dvc checkout {entry.path}` brings it back if DVC's cache has it; "
        f"`m1 run --profile {profile_name} --only {stage}` makes it again.",
    )


def fault_of(entry: lock.LockEntry) -> str | None:
    """What is wrong with the files of a data set, in a few words; None if nothing is."""
    place = paths.ROOT / entry.path
    try:
        stats = _stats(place)
        if not stats:
            return "it is empty" if place.exists() else GONE
        found = _hashes(entry, place, stats)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if _digest(found, whole=not entry.digest.endswith(".dir")) == entry.digest:
        return None
    return _difference(entry, found)


def digest_of(place: Path) -> str:
    """DVC's hash of a file or folder as it is now: of a file its MD5, of a folder the MD5 of its list of files."""
    return _digest({name: _md5(place / name) for name, _ in _stats(place)}, whole=place.is_file())


def _stats(place: Path) -> Stats:
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    found = []
    for file in files:
        stat = file.stat()
        name = file.relative_to(place).as_posix() if file != place else ""
        found.append((name, (stat.st_size, stat.st_mtime_ns, stat.st_ino)))
    return tuple(found)


def _hashes(entry: lock.LockEntry, place: Path, stats: Stats) -> dict[str, str]:
    """File -> MD5, in hex digits."""
    if sum(size for _, (size, _, _) in stats) <= READ_WHOLE:
        return {name: _md5(place / name) for name, _ in stats}
    memory = paths.STATE / "verified" / f"{entry.name}.json"
    try:
        known = {name: (tuple(stat), digest) for name, (stat, digest) in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        known = {}
    found = {}
    for name, stat in stats:
        seen, digest = known.get(name, (None, ""))
        found[name] = digest if seen == stat else _md5(place / name)
    write_json(memory, {name: (stat, found[name]) for name, stat in stats})
    return found


def hash_of(file: Path, algorithm: str) -> str:
    """A file's hash in hex digits, read piece by piece; `algorithm` is a name that hashlib knows."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def _md5(file: Path) -> str:
    return hash_of(file, "md5")


def _digest(found: dict[str, str], *, whole: bool) -> str:
    """Of one file that is the whole data set, or of a folder."""
    if whole:
        return found.get("", "")
    listed = [{"md5": found[name], "relpath": name} for name in sorted(found)]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def _difference(entry: lock.LockEntry, found: dict[str, str]) -> str:
    """The files that differ, if the list of those recorded is in DVC's cache."""
    listing = paths.ROOT / ".dvc" / "cache" / "files" / "md5" / entry.digest[:2] / entry.digest[2:]
    try:
        recorded = {file["relpath"]: file["md5"] for file in json.loads(listing.read_bytes())}
    except (OSError, ValueError, TypeError, KeyError):
        return "its content has changed"
    changes = [f"{name} is missing" for name in recorded if name not in found]
    changes += [f"{name} has changed" for name in recorded if name in found and found[name] != recorded[name]]
    changes += [f"{name} is not of it" for name in found if name not in recorded]
    return ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
