"""Instances and exports from elsewhere become tasks on a real git history, made of a real package's source."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from m1.errors import UsageError
from m1.tasks.swe.commits import history, reverted_commits
from m1.tasks.swe.github import read_github
from m1.tasks.swe.ingest import (
    instance_of,
    read_instances,
    task_of_instance,
    task_of_pull,
    tasks_of_instances,
)
from m1.tasks.swe.patches import apply_diff, make_diff
from m1.tasks.swe.reward import End, Judgement
from m1.tasks.swe.sources import Repository, read_commit
from m1.tasks.swe.tasks import check_patches
from stages.swe.predictions import evaluate, read_predictions
from tests.swe.packages import tree

CODE, TESTS = "inflection/__init__.py", "test_inflection.py"


class Clone:
    """A repository of three commits: a fault in the package, its mending with a test, and words only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        right = dict(tree("inflection"))
        faulty = {**right, CODE: right[CODE].replace(b"return string[0].lower()", b"return string[0].upper()")}
        assert faulty != right
        subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
        self.trees = [faulty, {**right, TESTS: right[TESTS] + b"\n\ndef test_more():\n    pass\n"}]
        self.trees.append({**self.trees[1], "README.rst": b"words\n"})
        self.commits = [self.commit(number, files) for number, files in enumerate(self.trees)]
        self.origin = Repository(
            name="inflection-git", licence="MIT", code=["inflection"], tests=[TESTS], path=str(folder)
        )

    def commit(self, number: int, files: dict[str, bytes]) -> str:
        for path, content in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "core.autocrlf=false"]
        subprocess.run(["git", "-C", self.folder, "add", "-A", "-f"], check=True)
        subprocess.run(["git", "-C", self.folder, *who, "commit", "-q", "-m", f"number {number}"], check=True)
        return subprocess.run(
            ["git", "-C", self.folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone"))


def test_commits_are_read_without_a_checkout(clone: Clone) -> None:
    for commit, files in zip(clone.commits, clone.trees, strict=True):
        assert read_commit(clone.folder, commit) == files
    assert history(clone.origin) == [clone.commits[2], clone.commits[1]]


def test_a_commit_is_taken_back_with_its_tests_kept(clone: Clone) -> None:
    [found] = reverted_commits(clone.origin)
    assert found.commit == clone.commits[1]
    assert found.right == clone.trees[1]
    assert found.faulty == {**clone.trees[1], CODE: clone.trees[0][CODE]}


def instance(clone: Clone, **changes) -> dict:
    right = {**clone.trees[0], CODE: clone.trees[1][CODE]}
    row = {
        "instance_id": "jpvanhal__inflection-1",
        "repo": "jpvanhal/inflection",
        "base_commit": clone.commits[0],
        "patch": make_diff(clone.trees[0], right),
        "test_patch": make_diff(right, clone.trees[1]),
        "problem_statement": "camelize gives a wrong result",
        "FAIL_TO_PASS": json.dumps([f"{TESTS}::test_camelize"]),
        "PASS_TO_PASS": [f"{TESTS}::test_singularize"],
        "version": "0.5",
    }
    return {**row, **changes}


@pytest.mark.parametrize("form", ["jsonl", "json", "object", "folder"])
def test_swe_bench_instances_become_tasks_and_come_back(clone: Clone, tmp_path: Path, form: str) -> None:
    row = instance(clone)
    file = tmp_path / ("set.jsonl" if form in ("jsonl", "folder") else "set.json")
    file.write_text(
        json.dumps(row) + "\n" if file.suffix == ".jsonl" else json.dumps({"x": row} if form == "object" else [row])
    )
    split = "train"
    [read] = read_instances(str(tmp_path if form == "folder" else file), split=split)
    base = read_commit(clone.folder, read["base_commit"])
    task = task_of_instance(read, base, clone.origin)
    assert (task.id, task.kind, task.issue) == (row["instance_id"], "repair", row["problem_statement"])
    assert task.locations == ((CODE, "camelize"),)
    assert task.fail_to_pass == (f"{TESTS}::test_camelize",)
    assert task.pass_to_pass == (f"{TESTS}::test_singularize",)
    assert check_patches(task, base) == ""
    assert apply_diff(task.right_tree(base), task.test_patch) == clone.trees[1]
    again = instance_of(task, base)
    assert task_of_instance({**again, "base_commit": row["base_commit"]}, base, clone.origin) == task


def test_instances_that_do_not_fit_are_told_with_the_reason(clone: Clone) -> None:
    told: dict[str, str] = {}
    rows = [
        instance(clone),
        instance(clone, instance_id="a", patch="words"),
        instance(clone, instance_id="b", base_commit="f" * 40),
        instance(clone, instance_id="c", base_commit=clone.commits[2]),
    ]
    made = tasks_of_instances(rows, clone.origin, told.__setitem__)
    assert [task.id for task, _ in made] == [rows[0]["instance_id"]]
    assert set(told) == {"a", "b", "c"}
    assert "no file header" in told["a"] and "does not apply" in told["c"]


def test_bad_instance_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"instance_id": "i", "repo": "r"}\n')
    with pytest.raises(UsageError, match="the first, i: it has no base_commit, patch, problem_statement"):
        read_instances(str(file))
    file.write_text("{\n")
    with pytest.raises(UsageError, match=r"the first, x\.jsonl:1: not JSON"):
        read_instances(str(file))
    with pytest.raises(UsageError, match="needs a revision"):
        read_instances("nobody/nothing")


def test_issues_and_pull_requests_become_tasks(clone: Clone, tmp_path: Path) -> None:
    issues, pulls = tmp_path / "issues.json", tmp_path / "pulls.json"
    issues.write_text(json.dumps([
        {"number": 7, "title": "camelize is wrong", "body": "It gives `DeviceType`."},
        {"number": 8, "title": "other", "body": None},
    ]))  # fmt: skip
    merge = {"oid": clone.commits[1]}
    pulls.write_text(json.dumps([
        {"number": 12, "title": "Mend", "body": "Fixes #7", "mergeCommit": merge, "closingIssuesReferences": []},
        {"number": 11, "title": "x", "body": None, "mergeCommit": merge, "closingIssuesReferences": [{"number": 8}]},
        {"number": 13, "title": "no issue #7", "body": "", "mergeCommit": merge},
        {"number": 14, "title": "not merged, fixes #7", "body": "", "mergeCommit": None},
        {"number": 15, "title": "closes #99", "body": "", "mergeCommit": merge},
        {"number": 16, "title": "words, resolves #7", "body": "", "mergeCommit": {"oid": clone.commits[2]}},
    ]))  # fmt: skip
    told: dict[str, str] = {}
    found = read_github(issues, pulls, reject=told.__setitem__)
    assert told == {
        "pull 13": "it closes no issue of the export",
        "pull 14": "it was not merged",
        "pull 15": "it closes no issue of the export",
    }
    assert [(pull.number, [i[0] for i in pull.issues]) for pull in found] == [(11, [8]), (12, [7]), (16, [7])]
    made = task_of_pull(found[1], clone.origin)
    assert made is not None
    task, base = made
    assert base == clone.trees[0] and task.issue == "# camelize is wrong\n\nIt gives `DeviceType`.\n"
    assert task.locations == ((CODE, "camelize"),)
    assert apply_diff(task.right_tree(base), task.test_patch) == clone.trees[1]
    assert task_of_pull(found[2], clone.origin) is None
    pulls.write_text('[{"number": 1}]')
    with pytest.raises(UsageError, match=r"pulls\.json\[0\]: it has no title, body, mergeCommit; export with --json"):
        read_github(issues, pulls)


# --- predictions ---


@pytest.mark.parametrize("form", ["jsonl", "list", "object"])
def test_predictions_are_judged_and_counted(clone: Clone, tmp_path: Path, form: str) -> None:
    base = clone.trees[0]
    tasks = [task_of_instance(instance(clone, instance_id=f"i-{n}"), base, clone.origin) for n in range(6)]
    patches = {"i-0": "right", "i-1": "wrong", "i-2": "", "i-3": "bad", "i-4": None, "gone-9": "right"}
    rows = [{"instance_id": k, "model_name_or_path": "m", "model_patch": v} for k, v in patches.items()]
    file = tmp_path / ("p.jsonl" if form == "jsonl" else "p.json")
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows if form == "list" else {row.pop("instance_id"): row for row in rows}))
    ends = {"right": End.RESOLVED, "wrong": End.REGRESSION, "": End.EMPTY, "bad": End.BAD_PATCH}
    report = evaluate(tasks, read_predictions(file), lambda task, patch: Judgement(ends[patch], 0.0))
    assert report["resolved_ids"] == ["i-0"] and report["unresolved_ids"] == ["i-1"]
    assert report["empty_patch_ids"] == ["i-2", "i-4"] and report["error_ids"] == ["i-3"]
    assert report["incomplete_ids"] == ["i-5"] and report["unknown_ids"] == ["gone-9"]
    assert report["total_instances"] == 6 and report["submitted_instances"] == 5 and report["completed_instances"] == 2
    assert report["schema_version"] == 2


def test_bad_predictions_are_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for text, message in [
        ("{", "not JSON"),
        ('{"instance_id": "a"}', "it has no instance_id or no model_patch"),
        ('{"instance_id": "a", "model_patch": ""}\n' * 2, "two predictions for it: neither is judged"),
    ]:
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_predictions(file)
    with pytest.raises(UsageError, match="cannot read"):
        read_predictions(tmp_path / "none.jsonl")
