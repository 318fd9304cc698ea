"""Tasks from elsewhere: SWE-bench, SWE-Gym and SWE-smith instances, and pull requests of a GitHub export.

What they bring becomes the same schema as our own tasks. The trees are read from a local clone; where an instance does
not name its tests, `stages.swe.ingest_run` finds them out in the sandbox. A row that cannot be used is handed to
`reject` with the reason, and the others are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from m1 import paths
from m1.data.hub import json_lines
from m1.errors import M1Error, UsageError
from m1.rows import LINES, Reject, objects, read_objects, require_any, shown
from m1.tasks.swe.github import PullRequest
from m1.tasks.swe.patches import PatchError, Tree, apply_diff, make_diff
from m1.tasks.swe.python_source import changed_locations
from m1.tasks.swe.sources import Repository, parent_of, read_commit
from m1.tasks.swe.tasks import Kind, SweTask

#: Told of a row that is not used: its name, or its place in the file, and the reason.
Rejecting = Callable[[str, str], None]

_NEEDED = ("instance_id", "repo", "base_commit", "patch", "problem_statement")
_TESTS = ("FAIL_TO_PASS", "PASS_TO_PASS")
_COMMIT = re.compile("[0-9a-fA-F]{7,64}")
_MOST_ID = 200


# --- SWE-bench, SWE-Gym ---


def read_instances(
    source: str,
    *,
    revision: str | None = None,
    split: str = "test",
    reject: Rejecting = lambda name, reason: None,
    tests_named: bool = False,
) -> list[dict[str, Any]]:
    """Instances of a .jsonl or .json file, of a folder of data files, or of a data set on the hub at a revision.

    Args:
        reject: of rows that are no instances, or have the id of an earlier one.
        tests_named: an instance must name tests that the patch makes pass: nobody will find them out.

    Raises:
        UsageError: the file cannot be read, a hub data set without a revision, or not one row is an instance.
    """
    rejected: list[Reject] = []
    good: dict[str, dict[str, Any]] = {}
    path = Path(source) if Path(source).is_absolute() else paths.ROOT / source
    for place, row in _rows(path, source, split, revision):
        if isinstance(row, Reject):
            rejected.append(row)
            continue
        name = row.get("instance_id")
        named = name if isinstance(name, str) and name else place
        fault = _fault(row, tests_named) or (f"{shown(name)} is given twice" if named in good else "")
        if fault:
            rejected.append(Reject(named[:_MOST_ID], fault))
        else:
            good[named] = row
    for each in rejected:
        reject(each.id, each.reason)
    require_any(source, len(good), rejected)
    return list(good.values())


def _rows(path: Path, source: str, split: str, revision: str | None) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    """(place, row) of every row of a source."""
    if path.is_file():
        read = read_objects(path)
        yield from ((each.id, each) for each in read.rejected)
        yield from read.good
        return
    if not path.exists() and (Path(source).suffix in (".json", *LINES) or source.startswith(("/", "."))):
        raise UsageError(f"no file {path}", "Check the name.")
    if revision is None and not path.is_dir():
        raise UsageError(
            f"{source}: no such file, and a data set on the hub needs a revision", "Name the commit it is at."
        )
    import datasets

    try:
        files = json_lines(path, None, split) if path.is_dir() else []
        for file in files:
            yield from ((f"{file.name}:{number}", row) for number, row in objects(file))
        if not files:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else source, split=split, revision=revision)
            yield from ((f"row {number}", dict(row)) for number, row in enumerate(loaded))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"data set {source}: {type(error).__name__}: {error}",
            "Check name, split and revision; a .jsonl file given by itself is read row by row.",
        ) from error


def _fault(row: Mapping[str, Any], tests_named: bool) -> str:
    """Why a row is no instance; empty if it is one."""
    missing = [name for name in _NEEDED if row.get(name) is None or str(row[name]).strip() == ""]
    if missing:
        return f"it has no {', '.join(missing)}; SWE-bench's fields are needed: {', '.join(_NEEDED)}"
    texts = [*_NEEDED, *(["test_patch"] if row.get("test_patch") is not None else [])]
    for name in texts:
        if not isinstance(row[name], str):
            return f"{name} is not text but {shown(row[name])}"
        if "\0" in row[name]:
            return f"{name} has a NUL character"
    if len(row["instance_id"]) > _MOST_ID or not row["instance_id"].isprintable():
        return f"its instance_id {shown(row['instance_id'])} is too long or has control characters"
    if not _COMMIT.fullmatch(row["base_commit"]):
        return f"base_commit {shown(row['base_commit'])} is not a commit's hash"
    for name in row:
        if name not in _TESTS and isinstance(name, str) and name.upper() in _TESTS and name.upper() not in row:
            return f"it has {shown(name)}, which is written {name.upper()}"
    try:
        wanted = {name: names_of_tests(row.get(name)) for name in _TESTS}
    except UsageError as error:
        return error.what
    if tests_named and not wanted["FAIL_TO_PASS"]:
        return "it names no tests that must pass (FAIL_TO_PASS); with --validate they are found out"
    return ""


def names_of_tests(value: Any) -> tuple[str, ...]:
    """Tests of FAIL_TO_PASS and PASS_TO_PASS: a list in some sets, in others JSON text of a list, or of one name.

    Raises:
        UsageError: it is something else, or a name in it can be none of a test.
    """
    if value is None or value == "":
        return ()
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(f"the list of tests {shown(value)} is not JSON", "Correct the instance.") from None
        found = [found] if isinstance(found, str) else found
    if not isinstance(found, (list, tuple)):
        raise UsageError(f"{shown(value)} is not a list of tests", "Correct the instance.")
    for name in found:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or name.startswith("-"):
            raise UsageError(f"{shown(name)} is not the name of a test", "Correct the instance.")
    return tuple(dict.fromkeys(found))


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


def tasks_of_instances(
    rows: Iterable[Mapping[str, Any]], origin: Repository, reject: Rejecting
) -> list[tuple[SweTask, Tree]]:
    """The instances that can be used, with the tree of their base; the others go to `reject` with the reason."""
    made = []
    for row in rows:
        try:
            tree = read_commit(origin.folder, row["base_commit"], origin.exclude)
            made.append((task_of_instance(row, tree, origin), tree))
        except M1Error as error:
            reject(str(row["instance_id"]), str(error))
    return made


# --- GitHub ---


def task_of_pull(pull: PullRequest, origin: Repository) -> tuple[SweTask, Tree] | None:
    """A pull request as a repair task without its tests yet, and the tree of its base; None if it changes no code.

    Raises:
        M1Error: the clone does not have the commit, or its parent.
    """
    base_commit = parent_of(origin.folder, pull.commit)
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


def tasks_of_pulls(pulls: Iterable[PullRequest], origin: Repository, reject: Rejecting) -> list[tuple[SweTask, Tree]]:
    """The pull requests that can be used, with the tree of their base; the others go to `reject` with the reason."""
    made = []
    for pull in pulls:
        try:
            found = task_of_pull(pull, origin)
        except (M1Error, PatchError) as error:
            reject(f"pull {pull.number}", str(error))
            continue
        if found is None:
            reject(f"pull {pull.number}", "it changes no code outside of tests")
        else:
            made.append(found)
    return made
