"""The schema of a software-engineering task, and the folder that holds a set of them.

A set is a folder: `tasks.jsonl`, `environments.json` (requirements by name), `sources/<name>/<base>.tar.gz` (trees
that the tasks start from) and `sources/<name>/<base>.json` (the tests of the tree that pass reliably). It needs no
network and no cache to be used.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from m1.config.reading import describe
from m1.errors import UsageError
from m1.files import read_lines, write_bytes, write_json
from m1.tasks.swe.patches import PatchError, Tree, apply_diff
from m1.tasks.swe.python_source import changed_locations
from m1.tasks.swe.sources import read_archive

#: Folder of a set inside a synthesised data set.
SET = "swe"
Kind = Literal["repair", "localise", "write-test"]
KINDS: tuple[Kind, ...] = ("repair", "localise", "write-test")


class SweTask(BaseModel):
    """One task.

    Attributes:
        id: content hash, or `<instance_id>` of an ingested instance with the kind behind it.
        bug: shared by the tasks that are made of one fault.
        source: name of the package or repository.
        base: which tree of the source: the archive's SHA-256 (12 digits) or a commit.
        origin: where the fault comes from; `mutations` are its kinds.
        setup_patch: from the base to the faulty tree that is given.
        gold_patch: from the faulty tree to the right one.
        test_patch: laid over the tree before the tests run; what it adds is not shown.
        locations: (file, element) pairs that the gold patch touches.
        fail_to_pass: tests that fail on the faulty and pass on the right tree.
        pass_to_pass: tests that pass on both; None stands for all reliable tests of the base less `fail_to_pass`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    kind: Kind
    bug: str
    source: str
    base: str
    licence: str
    split: Literal["train", "heldout"]
    environment: str
    origin: Literal["mutation", "combined", "commit", "swe-bench", "github"]
    mutations: tuple[str, ...] = ()
    issue: str
    setup_patch: str = ""
    gold_patch: str
    test_patch: str = ""
    locations: tuple[tuple[str, str], ...]
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] | None = None

    def faulty_tree(self, base: Mapping[str, bytes]) -> Tree:
        return apply_diff(base, self.setup_patch) if self.setup_patch else dict(base)

    def right_tree(self, base: Mapping[str, bytes]) -> Tree:
        return apply_diff(self.faulty_tree(base), self.gold_patch)


def content_id(*parts: str) -> str:
    """16 hex digits of SHA-256 over the parts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class TaskSet:
    """A folder of tasks, read.

    Raises:
        UsageError: the folder has no `tasks.jsonl`, or a line of it is not a task with at least one test that fails on
            the faulty and passes on the right tree: without that no answer can be told right from wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "tasks.jsonl"
        if not file.is_file():
            raise UsageError(f"{folder}: no tasks.jsonl", "Make the set with python -m stages.swe.")
        self.tasks = [_read(line, f"{file}:{number}") for number, line in enumerate(read_lines(file), 1)]
        places = folder / "environments.json"
        self.environments: dict[str, list[str]] = (
            json.loads(places.read_text(encoding="utf-8")) if places.is_file() else {}
        )
        self._tree = lru_cache(maxsize=8)(self._read_tree)
        self._tests = lru_cache(maxsize=8)(self._read_tests)

    def _place(self, task: SweTask, ending: str) -> Path:
        return self.folder / "sources" / task.source / f"{task.base}{ending}"

    def _read_tree(self, file: Path) -> Tree:
        if not file.is_file():
            raise UsageError(f"{file} is missing, tasks need it", "Make the set again.")
        return read_archive(file)

    def _read_tests(self, file: Path) -> list[str]:
        return json.loads(file.read_text(encoding="utf-8"))["tests"]

    def base(self, task: SweTask) -> Tree:
        """The tree that `setup_patch` applies to; not to be changed."""
        return self._tree(self._place(task, ".tar.gz"))

    def faulty(self, task: SweTask) -> Tree:
        return task.faulty_tree(self.base(task))

    def right(self, task: SweTask) -> Tree:
        return task.right_tree(self.base(task))

    def pass_to_pass(self, task: SweTask) -> list[str]:
        if task.pass_to_pass is not None:
            return list(task.pass_to_pass)
        failing = set(task.fail_to_pass)
        return [test for test in self._tests(self._place(task, ".json")) if test not in failing]


def _read(line: str, place: str) -> SweTask:
    try:
        task = SweTask.model_validate_json(line)
    except ValidationError as error:
        raise UsageError(f"{place}: {describe(error, SweTask)}", "Correct the line, or make the set again.") from error
    if not task.fail_to_pass or not all(test.strip() for test in task.fail_to_pass):
        raise UsageError(
            f"{place}: task {task.id} has no test in fail_to_pass, so that any answer would count as right",
            "Remove the line, or find the tests by running them: `--validate` of stages.swe.ingest_run.",
        )
    return task


def dump(task: SweTask) -> str:
    """The task's line of `tasks.jsonl`."""
    return json.dumps(task.model_dump(), ensure_ascii=True, sort_keys=False)


def write_tree(file: Path, tree: Mapping[str, bytes]) -> None:
    """A tar.gz that is the same for the same tree, below one top folder as sdists have."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(tree):
            info = tarfile.TarInfo(f"tree/{path}")
            info.size = len(tree[path])
            tar.addfile(info, io.BytesIO(tree[path]))
    write_bytes(file, gzip.compress(buffer.getvalue(), compresslevel=6, mtime=0))


def write_tests(file: Path, tests: Iterable[str]) -> None:
    write_json(file, {"tests": sorted(tests)})


def write_environments(folder: Path, requirements: Mapping[str, list[str]]) -> None:
    write_json(folder / "environments.json", dict(requirements))


def check_patches(task: SweTask, base: Mapping[str, bytes]) -> str:
    """What is wrong with the task's patches on its base; empty if they apply and say where they apply."""
    try:
        faulty = task.faulty_tree(base)
        right = apply_diff(faulty, task.gold_patch)
        if task.test_patch:
            apply_diff(right, task.test_patch)
    except PatchError as error:
        return str(error)
    return "" if tuple(changed_locations(faulty, right)) == task.locations else "locations differ from the gold patch"
