"""Pid files: only the very process that wrote one is ever signalled."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.process import ProcessRecord, lock_file, start_mark, tree_memory
from m1 import paths

proc_only = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="elsewhere there is only the time of day")


def test_record_of_a_live_process_round_trips(tmp_path: Path, stop_later: list[int]) -> None:
    process = subprocess.Popen(["sleep", "300"])
    stop_later.append(process.pid)
    ProcessRecord.of(process.pid, port=4200).write(tmp_path / "a.json")
    record = ProcessRecord.read(tmp_path / "a.json")
    assert record is not None and record.alive()
    assert record.extra == {"port": 4200}


def test_a_copy_of_a_checkout_has_none_of_its_processes_and_a_moved_one_keeps_them(
    tmp_path: Path, stop_later: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    stop_later.append(process.pid)
    original = tmp_path / "original"
    original.mkdir()
    monkeypatch.setattr(paths, "ROOT", original)
    record = ProcessRecord.of(process.pid)
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "copy")
    assert not record.alive() and not record.stop(grace=1) and record.orphans() == []
    assert process.poll() is None
    monkeypatch.setattr(paths, "ROOT", original.rename(tmp_path / "moved"))
    assert record.alive()


def test_what_a_killed_process_has_started_is_still_found_and_stopped(tmp_path: Path, stop_later: list[int]) -> None:
    script = "sleep 300 & echo $! > $0; wait"
    process = subprocess.Popen(["bash", "-c", script, str(tmp_path / "pid")], start_new_session=True)
    record = ProcessRecord.of(process.pid)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    child = int((tmp_path / "pid").read_text())
    stop_later.append(child)
    assert record.orphans() == []
    process.kill()
    process.wait()
    assert record.orphans() == [child]
    assert record.stop(grace=5) and record.orphans() == []
    assert not record.stop(grace=5)


def test_a_process_that_has_just_started_is_recorded_with_its_command() -> None:
    """The system shows an empty command line until exec is over; about one in 150 starts is caught in it."""
    for _ in range(600):
        process = subprocess.Popen(["sleep", "300"])
        try:
            assert ProcessRecord.of(process.pid).command == ["sleep", "300"]
        finally:
            process.kill()
            process.wait()


def test_another_process_with_the_same_number_is_not_touched(stop_later: list[int]) -> None:
    """What a recycled pid looks like: the number is alive, start time or command line are not the recorded ones."""
    process = subprocess.Popen(["sleep", "300"])
    stop_later.append(process.pid)
    record = ProcessRecord.of(process.pid)
    boot, _, ticks = record.started.rpartition(":")
    older = dataclasses.replace(record, started=f"{boot}:{int(ticks) - 1}")
    before_a_reboot = dataclasses.replace(record, started=f"another-boot:{ticks}")
    other = dataclasses.replace(record, command=["prefect", "server", "start"])
    for stranger in (older, before_a_reboot, other):
        assert not stranger.alive()
        assert stranger.stop(grace=1) is False
    assert process.poll() is None and record.alive()


def test_a_process_that_follows_another_is_another_one(stop_later: list[int]) -> None:
    """The same command line a moment later: only the start tells them apart."""
    marks = []
    for _ in range(2):
        process = subprocess.Popen(["sleep", "300"])
        stop_later.append(process.pid)
        marks.append(start_mark(process.pid))
        time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # starts are counted in ticks of the kernel's clock
    assert marks[0] != marks[1]


@proc_only
def test_a_change_of_the_clock_makes_no_process_another_one(
    tmp_path: Path, stop_later: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(["sleep", "300"])
    stop_later.append(process.pid)
    ProcessRecord.of(process.pid).write(tmp_path / "a.json")
    now, created = time.time, psutil.Process.create_time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
    record = ProcessRecord.read(tmp_path / "a.json")
    assert record is not None and record.alive()
    assert record.started == start_mark(process.pid)


@proc_only
def test_the_mark_is_the_boot_and_the_ticks_since(tmp_path: Path, stop_later: list[int]) -> None:
    """Also of a program whose name looks like the fields that follow it in /proc."""
    program = tmp_path / "a) R 1 (b 2"
    shutil.copy(shutil.which("sleep") or "", program)
    process = subprocess.Popen(["sleep", "300"], executable=program)
    stop_later.append(process.pid)
    assert ProcessRecord.of(process.pid).alive()  # it has its name now
    boot, ticks = start_mark(process.pid).split(":")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    since_boot = psutil.Process(process.pid).create_time() - psutil.boot_time()
    assert int(ticks) / os.sysconf("SC_CLK_TCK") == pytest.approx(since_boot, abs=0.02)


def test_the_mark_of_no_process_is_an_error() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(psutil.NoSuchProcess):
        start_mark(process.pid)


def test_stop_ends_a_process_and_what_is_below_it(tmp_path: Path) -> None:
    process = subprocess.Popen(["sh", "-c", "setsid sleep 300 & echo $! > pid; wait"], cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        pass
    child = ProcessRecord.of(int((tmp_path / "pid").read_text()))
    assert ProcessRecord.of(process.pid).stop(grace=5) is True
    assert not child.alive()
    process.wait(5)


def test_damaged_or_missing_pid_file_is_no_process(tmp_path: Path) -> None:
    assert ProcessRecord.read(tmp_path / "none.json") is None
    (tmp_path / "half.json").write_text('{"pid": 1')
    assert ProcessRecord.read(tmp_path / "half.json") is None


def test_lock_is_exclusive_and_survives_its_taker_in_a_child(tmp_path: Path, stop_later: list[int]) -> None:
    path = tmp_path / "lock"
    with lock_file(path, 0) as first:
        assert first is not None
        with lock_file(path, 0) as second:
            assert second is None
        child = subprocess.Popen(["sleep", "300"], pass_fds=(first,))
        stop_later.append(child.pid)
    with lock_file(path, 0) as third:
        assert third is None, "the child still holds the descriptor"
    child.kill()
    child.wait(10)
    with lock_file(path, 5) as fourth:
        assert fourth is not None


def test_memory_of_a_tree_counts_children(stop_later: list[int]) -> None:
    code = "import subprocess,sys; x=b'1'*50_000_000; subprocess.run(['sleep','300'])"
    process = subprocess.Popen([sys.executable, "-c", code])
    stop_later.append(process.pid)
    deadline = time.monotonic() + 30
    while tree_memory([process.pid]) < 50_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert tree_memory([process.pid]) < 150_000_000
