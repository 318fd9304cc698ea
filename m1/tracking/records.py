"""What DVC and git know: entries of dvc.lock, summaries of data stages, the commit that is checked out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m1 import paths
from m1.data import lock
from m1.errors import UsageError

#: A raw source as a data stage's summary names it: scalars alone.
Source = dict[str, Any]


@dataclass(frozen=True)
class DataRecord:
    """One data set as dvc.lock describes it.

    Attributes:
        name: DVC stage name, for example "corpus@tiny".
        path: folder, relative to the checkout.
        digest: DVC hash, 32 hex digits and ".dir" for a folder.
        command: the command in dvc.yaml.
        deps: [path, hash] of everything the command read.
        params: profile fields that DVC watches, by file.
        sources: what the data stage's own summary names as raw sources, each with version, hash and licence.
    """

    name: str
    path: str
    digest: str
    command: str = ""
    deps: list[list[str]] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)


def locked(stage: str, profile_name: str) -> DataRecord | None:
    """The record of a data stage in dvc.lock, or None."""
    found = lock.entry(stage, profile_name)
    if found is None:
        return None
    return DataRecord(
        name=found.name,
        path=found.path,
        digest=found.digest,
        command=found.command,
        deps=[list(dep) for dep in found.deps],
        params=dict(found.params),
        sources=_sources(summary(paths.ROOT / found.path)),
    )


def summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a data folder, or an empty mapping."""
    file = folder / "summary.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is damaged ({error})", f"Remove {folder} and rerun its stage.") from error
    return content if isinstance(content, dict) else {}


def left_out(profile_name: str, stage: str) -> list[str]:
    """Parts of a data stage that could not be done when it last ran, one sentence each."""
    found = summary(paths.data_dir(profile_name, stage)).get("left_out")
    return [str(sentence) for sentence in found] if isinstance(found, list) else []


def _sources(content: Mapping[str, Any]) -> list[Source]:
    """Raw sources of a summary: a list of mappings, or a mapping from name to mapping, under "sources"."""
    found = content.get("sources", [])
    if isinstance(found, dict):
        found = [{"name": name, **(facts if isinstance(facts, dict) else {})} for name, facts in found.items()]
    plain = (str, int, float, bool)
    return [{k: v for k, v in s.items() if isinstance(v, plain)} for s in found if isinstance(s, dict)]


def numbers(content: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The scalar values of a nested mapping, with keys joined by slashes."""
    found: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


@dataclass(frozen=True)
class Revision:
    """Commit that is checked out; `dirty` when a tracked or new file differs from it (dvc.lock aside)."""

    commit: str
    dirty: bool


def git_revision() -> Revision:
    """The state of the checkout; commit "none" where there is no git or no commit yet."""

    def git(*arguments: str) -> str | None:
        # The checkout may be another user's, in a container for example; only its state is read.
        command = ["git", "-c", f"safe.directory={paths.ROOT}", "-c", "core.fsmonitor=false", "-C", str(paths.ROOT)]
        try:
            done = subprocess.run(
                [*command, *arguments],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
                encoding="utf-8",
                errors="replace",
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # The run itself rewrites dvc.lock; that alone does not make the code another than the commit's.
    changes = git("status", "--porcelain", "--", ".", ":(exclude)dvc.lock")
    return Revision(commit=git("rev-parse", "--verify", "HEAD") or "none", dirty=bool(changes))


def relative(path: Path | str) -> str:
    """A path as it is stored: relative to the checkout where it is below it, so that a moved checkout still works."""
    path = Path(path).resolve()
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)
