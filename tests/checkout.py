"""The project's own code in a made-up checkout, and a copy of the checkout."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
COPIED = ("m1", "infra", "flows", "kernels", "stages", "data_specs", "profiles", "prefect.yaml", "dvc.yaml")
COPIED += ("params.yaml", ".dvc/config", ".dvcignore", ".gitignore", "pyproject.toml")


def copy_checkout(folder: Path) -> Path:
    """A copy of the checkout under git, without data, runs or services. Whoever starts services in it stops them."""
    for name in COPIED:
        source, target = CHECKOUT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def give_code(root: Path) -> None:
    """Let `root`, which shall be `m1.paths.ROOT`, have the code of this checkout: fingerprints are made of it."""
    for name in ("infra", "kernels", "m1", "stages"):
        (root / name).symlink_to(CHECKOUT / name)
