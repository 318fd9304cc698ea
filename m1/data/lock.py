"""What `dvc.lock` says of a data set: the one place where that file is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from m1 import paths
from m1.errors import UsageError

NAME = "dvc.lock"


@dataclass(frozen=True)
class LockEntry:
    """One stage of dvc.lock with its one output.

    Attributes:
        name: such as "corpus@tiny".
        path: of the output, relative to the checkout.
        digest: its hash, for a folder 32 hex digits and ".dir".
        size, files: bytes and number of files of the output.
        command: the command that made it.
        deps: (path, hash) of everything the command read.
        params: profile fields that DVC watches, by file.
    """

    name: str
    path: str
    digest: str
    size: int
    files: int
    command: str
    deps: tuple[tuple[str, str], ...] = ()
    params: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def entry(stage: str, profile_name: str) -> LockEntry | None:
    """What dvc.lock records of a data stage, or None.

    Raises:
        UsageError: the file cannot be read.
    """
    name = f"{stage}@{profile_name}"
    found = _stages().get(name)
    outs = (found or {}).get("outs") or []
    if not found or not outs or not outs[0].get("md5"):
        return None
    out, command = outs[0], found.get("cmd", "")
    return LockEntry(
        name=name,
        path=out["path"],
        digest=out["md5"],
        size=int(out.get("size") or 0),
        files=int(out.get("nfiles") or 1),
        command=command if isinstance(command, str) else " && ".join(command),
        deps=tuple((dep["path"], dep.get("md5") or dep.get("etag") or "") for dep in found.get("deps") or []),
        params=found.get("params") or {},
    )


def digest(stage: str, profile_name: str) -> str | None:
    """Hash of a data stage's output as DVC recorded it, or None."""
    found = entry(stage, profile_name)
    return found.digest if found else None


def _stages() -> dict:
    path = paths.ROOT / NAME
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read: {text}", "Restore it with git, or run `dvc repro`.") from error


@functools.lru_cache(maxsize=4)
def _parsed(content: bytes) -> dict:
    """A plan asks some forty times."""
    return (yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}).get("stages") or {}
