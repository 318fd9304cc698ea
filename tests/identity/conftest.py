from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from world import ASKING, CHECKOUT, CODE, FILES, PLAIN, World, finish_everything, write_profiles

from m1 import paths
from m1.run import profiles


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Of one module, and no longer: while it is there, the paths of this process are those of the copy."""
    root = tmp_path_factory.mktemp("identity") / "checkout"
    root.mkdir()
    for name in CODE:
        shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / name, root / name)
    shutil.copy(CHECKOUT / "dvc.yaml", root)
    (root / "params.yaml").write_text(f"profiles: [{PLAIN}, {ASKING}]\n")
    write_profiles(root)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ROOT", root)
        patch.setattr(paths, "PROFILES", root / "profiles")
        patch.setattr(paths, "DATA_SPECS", root / "data_specs")
        patch.setattr(paths, "STATE", root / ".m1")
        for name in (PLAIN, ASKING):
            finish_everything(profiles.load(name))
        yield World(root)
