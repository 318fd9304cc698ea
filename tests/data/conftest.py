"""A checkout without data for the data stages, and a writer of corpus specs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from m1 import paths
from m1.data import fetch
from tests.checkout import give_code


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that has the code and nothing else: the stages read specs and write data here, archives are cached
    here too."""
    root = tmp_path / "checkout"
    (root / "data_specs").mkdir(parents=True)
    give_code(root)
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "DATA_SPECS", root / "data_specs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fetch.cache_dir().is_relative_to(tmp_path)
    return root


@pytest.fixture
def write_spec(checkout: Path) -> Callable[..., str]:
    """Write a spec and return its name."""

    def write(sources: list[dict[str, Any]], **more: Any) -> str:
        content = {"description": "for tests", "sources": sources, **more}
        (checkout / "data_specs" / "corpus-test.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return "corpus-test"

    return write
