"""What counts as the data set that dvc.lock records: its bytes, and nothing less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m1 import paths
from m1.data import content, dvc, lock
from m1.errors import UsageError
from m1.files import remove


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which DVC has recorded a folder of three files, `data/small/tokens`."""
    root = tmp_path_factory.mktemp("checkout")
    stage = {"cmd": "true", "outs": ["data/small/tokens"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"tokens": {"foreach": ["small"], "do": stage}}}))
    place = root / "data" / "small" / "tokens"
    (place / "inner").mkdir(parents=True)
    (place / "train.bin").write_bytes(bytes(range(256)) * 40)
    (place / "inner" / "ä b.txt").write_text("text\n")
    (place / "empty").touch()
    for line in ("git init -q", f"{sys.executable} -m dvc init -q", f"{sys.executable} -m dvc commit -f -q"):
        subprocess.run(line.split(), cwd=root, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    return root


@pytest.fixture
def place(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set as it was recorded; whatever a test does to it is undone."""
    monkeypatch.setattr(paths, "ROOT", repository)
    monkeypatch.setattr(paths, "STATE", repository / ".m1")
    place = repository / "data" / "small" / "tokens"
    remove(place)  # as a user is told to do: DVC alone passes a file that has its old size and time
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "-q"], cwd=repository, check=True)
    return place


def entry() -> lock.LockEntry:
    found = lock.entry("tokens", "small")
    assert found is not None
    return found


def flip(file: Path, *, keep_time: bool = True) -> None:
    stat = file.stat()
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(changed)
    if keep_time:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_dvc_recorded_passes(place: Path) -> None:
    assert content.fault_of(entry()) is None
    content.verify("tokens", "small")
    content.verify("corpus", "small")  # never recorded: nothing is claimed of it


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_flipped_byte_is_found_whatever_the_time_says(place: Path, keep_time: bool) -> None:
    flip(place / "train.bin", keep_time=keep_time)
    with pytest.raises(UsageError, match=r"tokens of profile small .* train\.bin has changed.*dvc checkout"):
        content.verify("tokens", "small")
    (change,) = dvc.status(["tokens@small"])["tokens@small"]
    assert change.side == "output"


def test_missing_and_added_files_are_named(place: Path) -> None:
    (place / "inner" / "ä b.txt").unlink()
    (place / "more").write_text("x")
    assert content.fault_of(entry()) == "inner/ä b.txt is missing, more is not of it"


def test_a_set_that_is_gone_or_empty(place: Path) -> None:
    gone = place.with_name("elsewhere")
    place.rename(gone)
    assert content.fault_of(entry()) == content.GONE
    place.mkdir()
    assert content.fault_of(entry()) == "it is empty"
    place.rmdir()
    gone.rename(place)


def test_without_dvcs_cache_the_fault_is_found_but_not_the_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(place / "train.bin")
    cache = paths.ROOT / ".dvc" / "cache"
    cache.rename(cache.with_name("aside"))
    try:
        assert content.fault_of(entry()) == "its content has changed"
    finally:
        cache.with_name("aside").rename(cache)


def test_of_a_large_set_only_what_looks_changed_is_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "READ_WHOLE", 100)
    read: list[str] = []
    md5 = content._md5
    monkeypatch.setattr(content, "_md5", lambda file: read.append(file.name) or md5(file))
    assert content.fault_of(entry()) is None and len(read) == 3
    assert content.fault_of(entry()) is None and len(read) == 3
    flip(place / "train.bin", keep_time=False)
    assert content.fault_of(entry()) == "train.bin has changed" and read[3:] == ["train.bin"]
    next((paths.STATE / "verified").iterdir()).write_text("rubbish")
    assert content.fault_of(entry()) == "train.bin has changed" and len(read) == 7
