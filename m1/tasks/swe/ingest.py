"""Tasks from elsewhere: SWE-bench, SWE-Gym and SWE-smith instances, and GitHub issues with their pull requests.

What they bring becomes the same schema as our own tasks. The trees are read from a local clone; where an instance does
not name its tests, `stages.swe.ingest_run` finds them out in the sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1 import paths
from m1.errors import M1Error, UsageError
from m1.tasks.swe.patches import PatchError, Tree, apply_diff, make_diff, parse_diff
from m1.tasks.swe.python_source import changed_locations
from m1.tasks.swe.sources import Repository, git, read_commit
from m1.tasks.swe.tasks import Kind, SweTask

_NEEDED = ("instance_id", "repo", "base_commit", "patch", "problem_statement")


# --- SWE-bench, SWE-Gym ---


def read_instances(source: str, *, revision: str | None = None, split: str = "test") -> list[dict[str, Any]]:
    """Instances of a .jsonl or .json file, of a folder of data files, or of a data set on the hub at a revision.

    Raises:
        UsageError: no such file, not JSON, a hub data set without a revision, or an instance without a needed field.
    """
    path = Path(source) if Path(source).is_absolute() else paths.ROOT / source
    if path.is_file():
        rows = _read_json(path)
    else:
        if revision is None and not path.is_dir():
            raise UsageError(
                f"{source}: no such file, and a data set on the hub needs a revision", "Name the commit it is at."
            )
        import datasets

        try:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else source, split=split, revision=revision)
        except Exception as error:
            raise UsageError(
                f"data set {source}: {type(error).__name__}: {error}", "Check name and revision."
            ) from error
        rows = [dict(row) for row in loaded]
    for number, row in enumerate(rows):
        missing = [name for name in _NEEDED if not isinstance(row.get(name), str) or not row[name]]
        if missing:
            raise UsageError(
                f"{source}: instance {row.get('instance_id', number)} has no {', '.join(missing)}",
                "SWE-bench's fields are needed: " + ", ".join(_NEEDED) + ".",
            )
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
            rows = list(rows.values()) if isinstance(rows, dict) else rows
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}", "Correct the file.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: expected a list of objects", "Correct the file.")
    return rows


def names_of_tests(value: Any) -> tuple[str, ...]:
    """FAIL_TO_PASS and PASS_TO_PASS are lists in some sets and JSON text in others."""
    if value is None or value == "":
        return ()
    try:
        names = json.loads(value) if isinstance(value, str) else list(value)
    except ValueError as error:
        raise UsageError(f"test list {value[:60]!r} is not JSON", "Correct the instance.") from error
    return tuple(str(name) for name in names)


def task_of_instance(
    row: Mapping[str, Any], tree: Mapping[str, bytes], origin: Repository, kind: Kind = "repair"
) -> SweTask:
    """An instance as a task on the tree of its base commit.

    Raises:
        UsageError: its patch does not apply to the tree.
    """
    test_patch = row.get("test_patch") or ""
    try:
        right = apply_diff(tree, row["patch"])
        if test_patch:
            apply_diff(right, test_patch)
    except PatchError as error:
        raise UsageError(
            f"instance {row['instance_id']}: its patch does not apply at {row['base_commit'][:12]}: {error}",
            "Check that the clone is of the same repository.",
        ) from error
    return SweTask(
        id=f"{row['instance_id']}" if kind == "repair" else f"{row['instance_id']}.{kind}",
        kind=kind,
        bug=row["instance_id"],
        source=origin.name,
        base=row["base_commit"][:12],
        licence=origin.licence,
        split=origin.split,
        environment=origin.environment,
        origin="swe-bench",
        issue=row["problem_statement"],
        gold_patch=row["patch"],
        test_patch=test_patch,
        locations=tuple(changed_locations(tree, right)),
        fail_to_pass=names_of_tests(row.get("FAIL_TO_PASS")),
        pass_to_pass=names_of_tests(row.get("PASS_TO_PASS")),
    )


def instance_of(task: SweTask, tree: Mapping[str, bytes]) -> dict[str, Any]:
    """A repair task as a SWE-bench instance; `tree` is the task's base."""
    return {
        "instance_id": task.id,
        "repo": task.source,
        "base_commit": task.base,
        "patch": task.gold_patch,
        "test_patch": task.test_patch,
        "problem_statement": task.issue,
        "setup_patch": task.setup_patch,
        "FAIL_TO_PASS": json.dumps(task.fail_to_pass),
        "PASS_TO_PASS": json.dumps(task.pass_to_pass or ()),
    }


# --- GitHub: exports of the gh command ---


@dataclass(frozen=True)
class PullRequest:
    """A merged pull request with the issues that it closes.

    Attributes:
        commit: its merge commit; base: that commit's first parent.
    """

    number: int
    commit: str
    issues: tuple[tuple[int, str, str], ...]


_CLOSES = re.compile(r"\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?)[:\s]+(?:[\w.-]+/[\w.-]+)?#(\d+)", re.IGNORECASE)
_PULL_FIELDS = "number,title,body,mergeCommit,closingIssuesReferences"
_ISSUE_FIELDS = "number,title,body"


def read_github(issues_file: Path, pulls_file: Path) -> list[PullRequest]:
    """Pull requests that were merged and close an issue of the export, in the order of their numbers.

    The files are the output of `gh issue list --state all --json number,title,body` and
    `gh pr list --state merged --json number,title,body,mergeCommit,closingIssuesReferences`.

    Raises:
        UsageError: a file is not such an export.
    """
    issues = {}
    for row in _read_json(issues_file):
        _need(row, issues_file, _ISSUE_FIELDS.split(","))
        issues[int(row["number"])] = (int(row["number"]), row["title"] or "", row["body"] or "")
    found = []
    for row in _read_json(pulls_file):
        _need(row, pulls_file, _PULL_FIELDS.split(",")[:4])
        merge = row["mergeCommit"]
        named = [int(item["number"]) for item in row.get("closingIssuesReferences") or []]
        named += [int(number) for number in _CLOSES.findall(f"{row['title'] or ''}\n{row['body'] or ''}")]
        closed = tuple(issues[number] for number in dict.fromkeys(named) if number in issues)
        if merge and closed:
            found.append(PullRequest(int(row["number"]), merge["oid"], closed))
    return sorted(found, key=lambda pull: pull.number)


def _need(row: Mapping[str, Any], file: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise UsageError(f"{file}: an entry has no {', '.join(missing)}", f"Export with --json {_PULL_FIELDS}.")


def task_of_pull(pull: PullRequest, origin: Repository) -> tuple[SweTask, Tree] | None:
    """A pull request as a repair task without its tests yet, and the tree of its base; None if it changes no code.

    Raises:
        M1Error: the clone does not have the commit.
    """
    base_commit = git(origin.folder, "rev-parse", f"{pull.commit}^1").decode().strip()
    base = read_commit(origin.folder, base_commit, origin.exclude)
    after = read_commit(origin.folder, pull.commit, origin.exclude)
    changed = {path for path in base.keys() | after.keys() if base.get(path) != after.get(path)}
    code = {path for path in changed if not origin.is_test(path)}
    if not any(origin.is_code(path) for path in code):
        return None
    right = {path: c for path, c in base.items() if path not in code} | {p: after[p] for p in code if p in after}
    issue = "\n\n".join(f"# {title}\n\n{body}".strip() for _, title, body in pull.issues) + "\n"
    task = SweTask(
        id=f"{origin.name}-{pull.number}",
        kind="repair",
        bug=f"{origin.name}-{pull.number}",
        source=origin.name,
        base=base_commit[:12],
        licence=origin.licence,
        split=origin.split,
        environment=origin.environment,
        origin="github",
        issue=issue,
        gold_patch=make_diff(base, right),
        test_patch=make_diff(right, after),
        locations=tuple(changed_locations(base, right)),
        pass_to_pass=(),
    )
    return task, base


def tasks_of_instances(
    rows: Iterable[Mapping[str, Any]], origin: Repository, reject: Callable[[str, str], None]
) -> list[tuple[SweTask, Tree]]:
    """The instances that can be used, with the tree of their base; the others go to `reject` with the reason."""
    made = []
    for row in rows:
        try:
            parse_diff(row["patch"])
            tree = read_commit(origin.folder, row["base_commit"], origin.exclude)
            made.append((task_of_instance(row, tree, origin), tree))
        except (M1Error, PatchError) as error:
            reject(str(row["instance_id"]), str(error))
    return made
