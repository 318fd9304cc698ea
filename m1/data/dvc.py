"""The few things the flow asks of DVC. DVC records data; it never runs a stage here.

It is called in this process: a `dvc` command would take a second to start each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import yaml

from m1 import paths
from m1.config.differences import differences
from m1.config.reading import read_yaml
from m1.data import content, lock
from m1.errors import ServiceError, UsageError
from m1.files import write_text

if TYPE_CHECKING:
    from dvc.repo import Repo

T = TypeVar("T")
_BUSY_PATIENCE = 30.0
_COMMAND = "its command changed"
Side = Literal["input", "output", "setting", "command", "other"]


@dataclass(frozen=True)
class Change:
    """One thing in which a data stage is not up to date.

    Attributes:
        side: what has changed: a file or folder it reads, its output, a field of the profile, its command.
        name: of the file or folder.
        text: for people.
    """

    side: Side
    name: str
    text: str


def lists_profile(profile_name: str) -> bool:
    """Whether params.yaml names the profile, so that dvc.yaml has data stages for it."""
    return profile_name in _names(_read(paths.ROOT / "params.yaml"))


def _names(content: dict[str, object]) -> list[object]:
    names = content.get("profiles")
    return names if isinstance(names, list) else []


def ensure_profile(profile_name: str) -> bool:
    """Append the profile to the list in params.yaml, over which dvc.yaml's stages go. True if it was missing."""
    path = paths.ROOT / "params.yaml"
    content = _read(path)
    names = _names(content)
    if profile_name in names:
        return False
    text = path.read_text(encoding="utf-8")
    addition = yaml.safe_dump({"profiles": [*names, profile_name]}, default_flow_style=None, width=100)
    rest = {key: value for key, value in content.items() if key != "profiles"}
    comments = [line for line in text.split("\n") if line.startswith("#")]
    lines = [*comments, addition.rstrip("\n"), *([yaml.safe_dump(rest).rstrip("\n")] if rest else [])]
    write_text(path, "\n".join(lines) + "\n")
    return True


def command(target: str) -> str:
    """The shell command that dvc.yaml lists for a stage such as "corpus@tiny".

    Raises:
        UsageError: dvc.yaml does not list the stage.
        ServiceError: DVC cannot read dvc.yaml.
    """
    from dvc.dvcfile import load_file

    listed = _with_repo(lambda repo: {name: stage.cmd for name, stage in load_file(repo, "dvc.yaml").stages.items()})
    if target not in listed:
        raise UsageError(f"dvc.yaml lists no stage {target}", "Check the profile's name and `dvc stage list`.")
    lines = listed[target]
    return " && ".join(lines) if isinstance(lines, list) else str(lines)


def status(targets: list[str]) -> dict[str, list[Change]]:
    """What is out of date in each stage, by DVC's account and by the bytes of its output; empty where nothing is.

    Raises:
        ServiceError: DVC failed.
    """
    known = _with_repo(lambda repo: repo.status(targets=targets)) if targets else {}
    found = {
        target: [each for change in known.get(target, []) for each in _changes(target, change)] for target in targets
    }
    for target, changes in found.items():
        entry = lock.entry(*target.split("@", 1))
        if entry and not any(change.side == "output" for change in changes) and (fault := content.fault_of(entry)):
            changes.append(Change("output", entry.path, f"output {entry.path}: {fault}"))
    return found


def commit(target: str) -> None:
    """Record the present inputs and outputs of a stage in dvc.lock and the cache.

    Raises:
        ServiceError: DVC failed.
    """
    _with_repo(lambda repo: repo.commit(target, force=True))


def _with_repo(action: Callable[[Repo], T]) -> T:
    """Do something with the checkout as DVC sees it at this moment."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    deadline = time.monotonic() + _BUSY_PATIENCE
    while True:
        try:
            # DVC looks up targets from the working directory, whatever root it is given.
            with contextlib.chdir(paths.ROOT), Repo(str(paths.ROOT), config=_without_git()) as repo:
                return action(repo)
        except LockError as error:  # the user's own `dvc` command, most likely
            if time.monotonic() > deadline:
                raise ServiceError(f"DVC is busy: {error}", "Wait for the other dvc command to end.") from error
            time.sleep(0.5)
        except DvcException as error:
            raise ServiceError(f"DVC: {error}", "Run `dvc status` in the checkout to see more.") from error


def _without_git() -> dict[str, dict[str, bool]] | None:
    """DVC's own setting for a checkout that came as an archive."""
    return None if (paths.ROOT / ".git").exists() else {"core": {"no_scm": True}}


def _read(path: Path) -> dict[str, object]:
    return read_yaml(path)


def _changes(target: str, change: object) -> Iterator[Change]:
    """DVC's nested account of one change."""
    if not isinstance(change, dict):
        said = str(change)
        yield Change(
            "command" if said == "changed command" else "other", "", _COMMAND if said == "changed command" else said
        )
        return
    for kind, things in change.items():
        side: Side = {"changed deps": "input", "changed outs": "output"}.get(kind, "other")  # type: ignore[assignment]
        for name, how in things.items():
            if isinstance(how, dict):  # a profile; DVC names the section, we want the field
                for section in how:
                    yield from (Change("setting", name, text) for text in _field_changes(target, name, section))
            else:
                yield Change(side, name, f"{side} {name} is {how}")


def _field_changes(target: str, file: str, section: str) -> list[str]:
    recorded = lock.entry(*target.split("@", 1))
    old = recorded.params.get(file, {}).get(section) if recorded else None
    present: object = _read(paths.ROOT / file)
    for part in section.split("."):
        present = present.get(part) if isinstance(present, dict) else None
    return [f"profile: {text}" for text in differences(old, present, section)]
