"""What `dvc.lock` says of a data set: the one place where that file is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from m1 import paths
from m1.errors import UsageError

NAME = "dvc.lock"
_OUT = "Restore it with git, or run `dvc repro`."
_MAX_DEPTH = 40


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
    try:
        return _entry(name, _stages().get(name))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{paths.ROOT / NAME}: what it says of {name} is not what DVC writes ({type(error).__name__}: {error})",
            _OUT,
        ) from error


def _entry(name: str, found: dict[str, Any] | None) -> LockEntry | None:
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
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError, OverflowError) as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} cannot be read: {text}", _OUT) from error


@functools.lru_cache(maxsize=4)
def _parsed(content: bytes) -> dict:
    """A plan asks some forty times.

    Raises:
        ValueError: it is nested deeper than DVC writes, or has aliases, of which a few lines can make any amount.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(content, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"nested more than {_MAX_DEPTH} deep, or an alias")
    stages = (yaml.load(content, loader) or {}).get("stages") or {}
    if not isinstance(stages, dict):
        raise ValueError("its stages are no mapping")
    return stages
