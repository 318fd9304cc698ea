from __future__ import annotations

from pathlib import Path

import pytest
import scratch

from m1 import paths


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch copy that this process takes for its own checkout."""
    folder = scratch.make(tmp_path / "checkout")
    for name, value in (("ROOT", folder), ("PROFILES", folder / "profiles"), ("STATE", folder / ".m1")):
        monkeypatch.setattr(paths, name, value)
    return folder
