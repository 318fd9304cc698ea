from __future__ import annotations

from pathlib import Path

import pytest
import scratch

from m1 import paths


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch copy that this process takes for its own checkout."""
    folder = scratch.make(tmp_path / "checkout")
    for name, place in scratch.PLACES.items():
        monkeypatch.setattr(paths, name, folder / place)
    return folder


@pytest.fixture
def clock() -> list[float]:
    """When the next stage that takes no time has ended."""
    return [1000.0]
