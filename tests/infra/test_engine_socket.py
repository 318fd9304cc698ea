"""An engine that is silent, denied or gone is told apart, soon, and each with its way out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m1 import paths

ASK = "import os; from infra.sandbox import engine; {before}; print(engine.missing())"


@pytest.fixture
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A socket whose owner takes connections and says nothing."""
    place = tmp_path_factory.mktemp("engine") / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        yield place


def said(place: Path, before: str = "pass") -> str:
    """What a fresh process finds missing."""
    environment = {**os.environ, "DOCKER_HOST": f"unix://{place}"}
    command = [sys.executable, "-c", ASK.format(before=before)]
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_silent(silent: Path) -> None:
    started = time.monotonic()
    assert said(silent).startswith("the Docker engine is silent for 5 s")
    assert time.monotonic() - started < 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_denied(silent: Path) -> None:
    silent.chmod(0o600)
    for folder in silent.parents:
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    answer = said(silent, before="os.setuid(65534)")
    assert answer.startswith("this user may not speak to the Docker engine") and "group docker" in answer


def test_gone(tmp_path: Path) -> None:
    assert said(tmp_path / "docker.sock").startswith("no Docker engine answers")
