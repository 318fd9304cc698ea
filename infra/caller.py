"""The environment of whoever calls `m1 run` reaches the flow run, which a worker starts that somebody else has started.

It goes by a file that only its owner can read and that is gone once it has been read: Prefect's database would keep it.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from m1 import paths

#: Set in the flow run's process: the file to read.
VARIABLE = "M1_CALLER"
#: Where Prefect and MLflow are, the worker knows better than the caller did.
_WORKERS_OWN = ("PREFECT_", "MLFLOW_")
_FORGOTTEN_AFTER = 86_400.0


def leave() -> dict[str, str]:
    """Write this process's environment down for a flow run; returns the variables that the flow run is to be given."""
    folder = paths.STATE / "callers"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():  # of flow runs that never began
        if time.time() - old.stat().st_mtime > _FORGOTTEN_AFTER:
            old.unlink(missing_ok=True)
    file = folder / f"{uuid.uuid4().hex}.json"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        json.dump(dict(os.environ), stream)
    return {VARIABLE: str(file)}


def adopt() -> None:
    """Take the caller's environment in place of the worker's; nothing happens in a run that `m1 run` did not start."""
    name = os.environ.pop(VARIABLE, None)
    if name is None:
        return
    file = Path(name)
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a second try of the run, whose first one has taken it
        return
    file.unlink(missing_ok=True)
    replace(os.environ, theirs)


def replace(present: os._Environ[str] | dict[str, str], theirs: Mapping[str, str]) -> None:
    """Make `present` what `theirs` is, apart from the worker's own variables."""
    for key in [key for key in present if not key.startswith(_WORKERS_OWN) and key not in theirs]:
        del present[key]
    present.update({key: value for key, value in theirs.items() if not key.startswith(_WORKERS_OWN)})
