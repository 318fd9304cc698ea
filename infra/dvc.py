"""The few things the flow asks of DVC. DVC records data; it never runs a stage here.

Commands run as `python -m dvc` in the checkout: DVC resolves targets against the working directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import yaml

from m1 import paths
from m1.errors import ServiceError, UsageError

_BUSY_PATIENCE = 30.0


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
        UsageError: dvc.yaml is missing, wrong, or does not list the stage.
    """
    from dvc.dvcfile import load_file
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    path = paths.ROOT / "dvc.yaml"
    try:
        with Repo(str(paths.ROOT)) as repo:
            stages = load_file(repo, str(path)).stages  # type: ignore[attr-defined]
            if target not in stages:
                raise UsageError(f"dvc.yaml lists no stage {target}", "Check the profile's name and `dvc stage list`.")
            listed = stages[target].cmd
    except DvcException as error:
        raise UsageError(f"{path}: {error}", "Correct dvc.yaml.") from error
    return " && ".join(listed) if isinstance(listed, list) else str(listed)


def status(targets: list[str]) -> dict[str, list[str]]:
    """Why each stage is not up to date, in plain words; an empty list for one that is.

    Raises:
        ServiceError: DVC failed.
    """
    if not targets:
        return {}
    known = json.loads(_dvc(["status", "--json", *targets]) or "{}")
    return {target: [text for change in known.get(target, []) for text in _reasons(change)] for target in targets}


def commit(target: str) -> None:
    """Record the present outputs and inputs of a stage in dvc.lock and the cache."""
    _dvc(["commit", "--force", "--quiet", target])


def digest(target: str) -> str | None:
    """Hash of the first output of a stage in dvc.lock, or None."""
    path = paths.ROOT / "dvc.lock"
    if not path.is_file():
        return None
    entry = (_read(path).get("stages") or {}).get(target) or {}
    outs = entry.get("outs") or []
    return outs[0].get("md5") if outs else None


def inputs(target: str) -> list[str]:
    """Paths of the recorded dependencies of a stage, from dvc.lock; empty if it never ran."""
    path = paths.ROOT / "dvc.lock"
    entry = (_read(path).get("stages") or {}).get(target) or {} if path.is_file() else {}
    return [dep["path"] for dep in entry.get("deps") or []]


def _read(path: Any) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {error}", "Restore the file with git.") from error


def _reasons(change: Any) -> list[str]:
    """DVC's nested account of one change as short sentences."""
    if isinstance(change, str):
        return ["its command changed" if change == "changed command" else change]
    texts = []
    for kind, things in change.items():
        side = {"changed deps": "input", "changed outs": "output"}.get(kind, kind)
        for name, how in things.items():
            if isinstance(how, dict):
                texts += [f"profile section changed: {field} ({name} {state})" for field, state in how.items()]
            else:
                texts.append(f"{side} {name} is {how}")
    return texts


def _dvc(arguments: list[str]) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + _BUSY_PATIENCE
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=paths.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return done.stdout
        busy = "is busy" in done.stderr or "Unable to acquire lock" in done.stderr
        if busy and time.monotonic() < deadline:
            time.sleep(0.5)  # somebody's own `dvc` command
            continue
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")), " ".join(lines[-1:]))
        raise ServiceError(
            f"dvc {' '.join(arguments)} failed: {said}", "Run the same command in the checkout to see more."
        )
