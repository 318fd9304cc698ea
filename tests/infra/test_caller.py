"""A flow run has the environment of the `m1 run` that asked for it, not that of the worker that starts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra import caller
from m1 import paths


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "STATE", tmp_path / ".m1")
    return tmp_path / ".m1"


def test_only_the_owner_can_read_it_and_it_is_read_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret äß 'quoted'\nand more")
    given = caller.leave()
    (file,) = (state / "callers").iterdir()
    assert given == {caller.VARIABLE: str(file)} and file.stat().st_mode & 0o077 == 0
    theirs = dict(os.environ)

    monkeypatch.setattr(os, "environ", {"TOKEN": "of the worker", "WORKER": "1", "PREFECT_API_URL": "here", **given})
    caller.adopt()
    kept = {key: value for key, value in theirs.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    assert os.environ == {**kept, "PREFECT_API_URL": "here"}
    assert not file.exists()


def test_where_nobody_left_one_the_workers_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"WORKER": "1"}
    monkeypatch.setattr(os, "environ", environment)
    caller.adopt()
    environment[caller.VARIABLE] = "/nowhere/file.json"
    caller.adopt()
    assert environment == {"WORKER": "1"}


def test_what_nobody_came_for_does_not_lie_about(state: Path) -> None:
    caller.leave()
    (old,) = (state / "callers").iterdir()
    os.utime(old, (0, 0))
    given = caller.leave()
    assert [str(file) for file in (state / "callers").iterdir()] == [given[caller.VARIABLE]]
