"""What is kept with a run besides its metrics: figures, the profile, which code it was."""

from __future__ import annotations

import getpass
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import JsonValue

from m1.config.profile import Profile
from m1.tracking import pages
from m1.tracking.markdown import Picture
from m1.tracking.records import Revision
from m1.tracking.server import Server

if TYPE_CHECKING:
    from mlflow.entities import Run

FIGURES = "figures"
#: Small ones for descriptions.
_PREVIEWS = "previews"
#: Width of an image in a description, in pixels: a wider one would push the page's right column out of sight.
_PREVIEW_WIDTH = 560
METRICS_FILE = "metrics.md"
PROFILE_FILE = "profile.yaml"


def keep_figure(server: Server, run: Run, file: Path, name: str, title: str) -> list[Picture]:
    """Keep a figure with a run, and a small one for its description; nothing where there is no such image."""
    from PIL import Image

    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("RGB")
    except OSError:
        return []
    small.thumbnail((_PREVIEW_WIDTH, 4 * _PREVIEW_WIDTH))
    preview = io.BytesIO()
    small.save(preview, "PNG")
    run_id = run.info.run_id
    server.log_file(run_id, name, content, FIGURES)
    server.log_file(run_id, name, preview.getvalue(), _PREVIEWS)
    page = pages.artifact_page(run.info.experiment_id, run_id, f"{FIGURES}/{name}")
    return [Picture(title, pages.artifact_source(run_id, f"{_PREVIEWS}/{name}"), page)]


def code_tags(revision: Revision) -> dict[str, str]:
    """The commit, and who started it, as tags of a run."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = ""
    return {
        "git_commit": revision.commit,
        "git_dirty": str(revision.dirty).lower(),
        "mlflow.source.git.commit": revision.commit if revision.commit != "none" else "",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user,
    }


def log_profile(server: Server, run_id: str, profile: Profile) -> None:
    """Keep the whole resolved profile with a run."""
    server.log_file(run_id, PROFILE_FILE, yaml.safe_dump(profile.to_dict(), sort_keys=False).encode())


def flatten(values: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and texts; lists of scalars stay one value."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat
