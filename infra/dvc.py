"""The few things the flow asks of DVC. DVC records data; it never runs a stage here.

It is called in this process: a `dvc` command would take a second to start each time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import yaml

from m1 import paths
from m1.errors import ServiceError, UsageError

_BUSY_PATIENCE = 30.0


def lists_profile(profile_name: str) -> bool:
    """Whether params.yaml names the profile, so that dvc.yaml has data stages for it."""
    return profile_name in (_read(paths.ROOT / "params.yaml").get("profiles") or [])


def ensure_profile(profile_name: str) -> bool:
    """Append the profile to the list in params.yaml, over which dvc.yaml's stages go. True if it was missing."""
    path = paths.ROOT / "params.yaml"
    content = _read(path)
    names = content.get("profiles") or []
    if profile_name in names:
        return False
    text = path.read_text()
    addition = yaml.safe_dump({"profiles": [*names, profile_name]}, default_flow_style=None, width=100)
    rest = {key: value for key, value in content.items() if key != "profiles"}
    comments = [line for line in text.splitlines() if line.startswith("#")]
    lines = [*comments, addition.rstrip("\n"), *([yaml.safe_dump(rest).rstrip("\n")] if rest else [])]
    temporary = path.with_name(f".params.{os.getpid()}.yaml")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)
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


def status(targets: list[str]) -> dict[str, list[str]]:
    """Why each stage is not up to date, in plain words; an empty list for one that is.

    Raises:
        ServiceError: DVC failed.
    """
    known = _with_repo(lambda repo: repo.status(targets=targets)) if targets else {}
    recorded = {target: _recorded(target).get("params") or {} for target in targets}
    return {t: [text for change in known.get(t, []) for text in _reasons(change, recorded[t])] for t in targets}


def commit(target: str) -> None:
    """Record the present inputs and outputs of a stage in dvc.lock and the cache.

    Raises:
        ServiceError: DVC failed.
    """
    _with_repo(lambda repo: repo.commit(target, force=True))


def _with_repo(action: Callable[[Any], Any]) -> Any:
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
            with contextlib.chdir(paths.ROOT), Repo(str(paths.ROOT)) as repo:
                return action(repo)
        except LockError as error:  # the user's own `dvc` command, most likely
            if time.monotonic() > deadline:
                raise ServiceError(f"DVC is busy: {error}", "Wait for the other dvc command to end.") from error
            time.sleep(0.5)
        except DvcException as error:
            raise ServiceError(f"DVC: {error}", "Run `dvc status` in the checkout to see more.") from error


def digest(target: str) -> str | None:
    """Hash of the first output of a stage in dvc.lock, or None."""
    outs = _recorded(target).get("outs") or []
    return outs[0].get("md5") if outs else None


def _recorded(target: str) -> dict[str, Any]:
    path = paths.ROOT / "dvc.lock"
    return (_read(path).get("stages") or {}).get(target) or {} if path.is_file() else {}


def _read(path: Any) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {error}", "Restore the file with git.") from error


def _reasons(change: Any, recorded: dict[str, Any]) -> list[str]:
    """DVC's nested account of one change as short sentences."""
    if isinstance(change, str):
        return ["its command changed" if change == "changed command" else change]
    texts = []
    for kind, things in change.items():
        side = {"changed deps": "input", "changed outs": "output"}.get(kind, kind)
        for name, how in things.items():
            if isinstance(how, dict):  # a profile; DVC names the section, we want the field
                texts += [text for section in how for text in _field_changes(name, section, recorded.get(name) or {})]
            else:
                texts.append(f"{side} {name} is {how}")
    return texts


def _field_changes(file: str, section: str, recorded: dict[str, Any]) -> list[str]:
    present: Any = _read(paths.ROOT / file)
    for part in section.split("."):
        present = present.get(part) if isinstance(present, dict) else None
    return [f"profile: {text}" for text in differences(recorded.get(section), present, section)]


def differences(old: Any, new: Any, name: str) -> list[str]:
    """Every field in which two nested settings differ, as "section.field old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [text for key in keys for text in differences(old.get(key), new.get(key), f"{name}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for i, pair in enumerate(zip(old, new)) for text in differences(*pair, f"{name}[{i}]")]
    return [] if old == new else [f"{name} {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
