"""Real commits as tasks: the fault is the code before a commit, the right code and the tests are those after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from m1.errors import M1Error
from m1.tasks.swe.patches import Tree
from m1.tasks.swe.sources import Repository, commit_of, git, read_commit


@dataclass(frozen=True)
class Reverted:
    """A commit that changes code and tests; `faulty` has its tests and its parent's code."""

    commit: str
    right: Tree
    faulty: Tree


def history(repository: Repository) -> list[str]:
    """The first-parent history from `revision` back, newest first, root commit left out, at most `commits` long.

    Raises:
        M1Error: no repository, no such revision.
    """
    newest = commit_of(repository.folder, repository.revision)
    listed = git(repository.folder, "rev-list", "--first-parent", "--parents", f"-n{repository.commits}", newest)
    rows = [line.split() for line in listed.decode("ascii").split("\n") if line]
    return [row[0] for row in rows if len(row) > 1]


def revert(repository: Repository, commit: str) -> Reverted | None:
    """A commit with its code taken back; None unless it changes code and tests, both as Python."""
    right = read_commit(repository.folder, commit, repository.exclude)
    before = read_commit(repository.folder, f"{commit}^1", repository.exclude)
    changed = [path for path in right.keys() | before.keys() if right.get(path) != before.get(path)]
    code = [path for path in changed if repository.is_code(path)]
    if not code or not any(repository.is_test(path) and path.endswith(".py") for path in changed):
        return None
    faulty = dict(right)
    for path in code:
        if path in before:
            faulty[path] = before[path]
        else:
            del faulty[path]
    return Reverted(commit, right, faulty)


def reverted_commits(
    repository: Repository, reject: Callable[[str, str], None] = lambda commit, reason: None
) -> Iterator[Reverted]:
    """The usable commits of a repository, newest first; one that cannot be read goes to `reject` with the reason."""
    for commit in history(repository):
        try:
            found = revert(repository, commit)
        except M1Error as error:
            reject(commit, str(error))
            continue
        if found is not None:
            yield found
