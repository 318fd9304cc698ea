"""No process of a stage outlives its launcher, however either of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra import supervise

SUPERVISOR = str(Path(supervise.__file__))


def start(command: list[str], folder: Path, *, grace: float = 5) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-I", "-S", SUPERVISOR, str(os.getpid()), str(grace), *command]
    return subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


def read_pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not (folder / "pids").exists() or not (folder / "pids").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(word) for word in (folder / "pids").read_text().split()]


@pytest.mark.parametrize(
    ("script", "returncode"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -signal.SIGKILL), ("kill -15 $$", -signal.SIGTERM)],
)
def test_ends_as_its_command_ends(script: str, returncode: int, tmp_path: Path) -> None:
    assert start(["sh", "-c", script], tmp_path).wait(30) == returncode


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    process = start(["/does/not/exist"], tmp_path)
    assert process.wait(30) == 127
    assert process.stdout is not None and "error: cannot start /does/not/exist" in process.stdout.read()


def test_children_left_by_the_command_are_ended(tmp_path: Path) -> None:
    process = start(["sh", "-c", "setsid sleep 300 & echo $! > pids; exit 3"], tmp_path)
    assert process.wait(30) == 3
    assert gone(read_pids(tmp_path), 1)


def test_sigterm_ends_the_whole_tree(tmp_path: Path, tree: Path) -> None:
    process = start(["sh", str(tree)], tmp_path)
    pids = read_pids(tmp_path)
    process.terminate()
    process.wait(30)
    assert gone(pids, 1)


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    process = start(["sh", "-c", "trap '' TERM; echo $$ > pids; while :; do sleep 0.1; done"], tmp_path, grace=0.5)
    pids = read_pids(tmp_path)
    process.terminate()
    assert process.wait(30) == -signal.SIGKILL
    assert gone(pids, 1)


def test_launcher_killed_with_sigkill_leaves_nothing(tmp_path: Path, tree: Path) -> None:
    """The launcher cannot clean up: the supervisor notices that its parent changed."""
    command = f"[sys.executable, '-I', '-S', {SUPERVISOR!r}, str(os.getpid()), '5', 'sh', {str(tree)!r}]"
    code = f"import os, subprocess, sys; subprocess.run({command})"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    pids = read_pids(tmp_path)
    pids += supervise.descendants(launcher.pid)
    launcher.kill()
    launcher.wait(30)
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is a Linux feature")
def test_supervisor_killed_with_sigkill_ends_its_command(tmp_path: Path) -> None:
    process = start(["sh", "-c", "echo $$ > pids; exec sleep 300"], tmp_path)
    pids = read_pids(tmp_path)
    process.kill()
    process.wait(30)
    assert gone(pids)
