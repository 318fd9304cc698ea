"""Garbage in the files that runs and DVC leave: it is left out, or one line says which file and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m1 import paths
from m1.data import dvc, lock
from m1.errors import UsageError
from m1.run import folder
from m1.run.contract import load_request, load_result

GARBAGE = {
    "nothing": b"", "zeros": b"\0" * 4096, "not UTF-8": b"\xff\xfe{}\n", "UTF-16": "{}".encode("utf-16"),
    "cut off": b'{"step": 3, "met', "a list": b"[]", "a number": b"7", "null": b"null", "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000, "a huge number": b'{"step": ' + b"9" * 10_000 + b"}",
    "lone surrogate": b'{"step": "\\ud800"}', "twice": b'{"step": 1, "step": 2}',
}  # fmt: skip
#: Anchors that stand for 9^9 values, and nesting beyond any stack.
BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 10)
)
YAML = {**GARBAGE, "an alias bomb": BOMB, "a deep flow": b"a: " + b"[" * 100_000, "a date": b"a: 2024-13-45\n"}


@pytest.mark.parametrize("kind", GARBAGE)
def test_metrics_around_garbage_are_read(tmp_path: Path, kind: str) -> None:
    good = [{"step": n, "time": 1.0, "metrics": {"a": n / 2}} for n in (1, 2)]
    odd = [{"step": "1", "metrics": {}}, {"step": 1, "metrics": {"a": "b"}}, {"step": 1, "metrics": 7}, {"metrics": {}},
           {"progress": 7}, {"progress": {"done": "x", "total": 1, "text": ""}}, {"progress": {}}]  # fmt: skip
    progress = {"progress": {"done": 1, "total": 4, "text": "a\u2028b"}}
    lines = [json.dumps(line, ensure_ascii=False).encode() for line in (good[0], progress, *odd)]
    content = [*lines, GARBAGE[kind], json.dumps(good[1]).encode()]
    (tmp_path / folder.METRICS).write_bytes(b"\n".join(content) + b"\n")
    assert [(line.step, line.metrics) for line in folder.read_metrics(tmp_path)] == [(1, {"a": 0.5}), (2, {"a": 1.0})]
    assert folder.read_progress(tmp_path) == (
        None if len(GARBAGE[kind]) > 20_000 else folder.Progress(25.0, "a\u2028b")
    )


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_damaged_result_is_one_line(tmp_path: Path, kind: str) -> None:
    for name in (folder.RESULT, folder.REQUEST, folder.INTERRUPTION):
        (tmp_path / name).write_bytes(GARBAGE[kind])
    with pytest.raises(UsageError, match=r"result\.json is damaged.*Remove") as caught:
        load_result(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert load_request(tmp_path) is None
    assert folder.read_interruption(tmp_path, "sft") is None


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for name in (folder.RESULT, folder.REQUEST, folder.INTERRUPTION, folder.METRICS):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=r"result\.json cannot be read"):
        load_result(tmp_path)
    assert folder.read_metrics(tmp_path) == [] and folder.read_interruption(tmp_path, "sft") is None


ENTRIES = [
    b"[1]",
    b"7",
    *(
        b"{corpus@tiny: " + entry + b"}"
        for entry in (
            b"7",
            b"{outs: 7}",
            b"{outs: [7]}",
            b"{outs: {a: 1}}",
            b"{outs: [{md5: a}]}",
            b"{outs: [{md5: a, path: b, size: c}]}",
            b"{outs: [{md5: a, path: b}], deps: [7]}",
            b"{outs: [{md5: a, path: b}], cmd: 7}",
        )
    ),
]


@pytest.mark.parametrize("content", [*YAML.values(), *(b"stages: " + entry + b"\n" for entry in ENTRIES)])
def test_a_damaged_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / lock.NAME).write_bytes(content)
    try:
        assert lock.entry("corpus", "tiny") is None  # what is no mapping with stages says nothing of one
        assert b"corpus@tiny" not in content
    except UsageError as error:
        assert "dvc.lock" in str(error) and "Restore it with git" in str(error)
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("kind", [kind for kind in YAML if kind != "nothing"])
def test_damaged_parameters_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "params.yaml").write_bytes(YAML[kind])
    try:
        dvc.lists_profile("tiny")
    except UsageError as error:
        assert "params.yaml" in str(error) and "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert kind in ("a huge number", "lone surrogate"), "a mapping without profiles"
