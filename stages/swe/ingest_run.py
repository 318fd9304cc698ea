"""Ingest SWE-bench instances, or GitHub exports, into a set of tasks: python -m stages.swe.ingest_run --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from infra.sandbox import Sandbox
from infra.sandbox.images import build_environment
from m1.errors import M1Error, UsageError
from m1.files import write_rows, write_text
from m1.rows import Reject, require_any, summary
from m1.streams import make_readable
from m1.tasks.swe import ingest, sources, validate
from m1.tasks.swe.github import read_github
from m1.tasks.swe.patches import Tree, apply_diff
from m1.tasks.swe.reward import LIMITS
from m1.tasks.swe.runner import Runs
from m1.tasks.swe.sources import Repository, SweSpec
from m1.tasks.swe.tasks import SweTask, dump, write_environments, write_tests, write_tree
from m1.tasks.swe.validate import Trial


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, default=Path("data_specs/swe.yaml"))
    parser.add_argument("--repository", required=True, help="name of the clone in the spec's repositories")
    parser.add_argument("--instances", help="SWE-bench style .jsonl or .json, folder, or data set on the hub")
    parser.add_argument("--revision", help="commit of the data set on the hub")
    parser.add_argument("--split", default="test")
    parser.add_argument("--issues", type=Path, help="gh issue list --state all --json number,title,body")
    parser.add_argument(
        "--pulls",
        type=Path,
        help="gh pr list --state merged --json number,title,body,mergeCommit,closingIssuesReferences",
    )
    parser.add_argument(
        "--validate", action="store_true", help="run the tests; without it instances are taken as they are"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    make_readable()
    try:
        made = _ingest(options)
    except M1Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(f"{made} tasks; see {options.out}")


def _ingest(options: argparse.Namespace) -> int:
    by_pulls = options.issues is not None and options.pulls is not None
    if bool(options.instances) == by_pulls:
        raise UsageError("nothing, or two things, to ingest", "Give --instances, or --issues and --pulls.")
    if (options.out / "tasks.jsonl").exists():
        raise UsageError(f"{options.out} holds a set already", "Choose another --out.")
    spec = sources.load(options.spec)
    origin = next((r for r in spec.repositories if r.name == options.repository), None)
    if origin is None:
        known = ", ".join(r.name for r in spec.repositories) or "none"
        raise UsageError(f"--repository {options.repository} is not in {options.spec}", f"Repositories there: {known}.")
    sources.commit_of(origin.folder, "HEAD")  # a clone that is none is told once, not for every row
    rejected: list[Reject] = []

    def reject(name: str, reason: str) -> None:
        rejected.append(Reject(name, reason))

    try:
        made = _tasks(options, origin, reject)
        if made and (options.validate or by_pulls):
            image = build_environment(origin.environment, spec.environments[origin.environment].requirements)
            with Sandbox(image=image, limits=LIMITS) as sandbox:
                made = validated(sandbox, origin, made, reject)
    finally:
        where = options.out / "rejected.jsonl"
        if rejected:
            write_rows(where, [asdict(each) for each in rejected])
    require_any(options.instances or options.pulls, len(made), rejected, str(where))
    write_set(options.out, spec, made)
    if rejected:
        print(summary(rejected, where), file=sys.stderr)
    return len(made)


def _tasks(
    options: argparse.Namespace, origin: Repository, reject: Callable[[str, str], None]
) -> list[tuple[SweTask, Tree]]:
    """Tasks as they are brought, with the trees of their bases."""
    if options.instances:
        rows = ingest.read_instances(
            options.instances,
            revision=options.revision,
            split=options.split,
            reject=reject,
            tests_named=not options.validate,
        )
        return ingest.tasks_of_instances(rows, origin, reject)
    ours = origin.names_on_github()
    return ingest.tasks_of_pulls(read_github(options.issues, options.pulls, ours=ours, reject=reject), origin, reject)


def validated(
    sandbox: Runs, origin: Repository, found: Sequence[tuple[SweTask, Tree]], reject: Callable[[str, str], None]
) -> list[tuple[SweTask, Tree]]:
    """The tasks whose gold patch makes failing tests pass and breaks none, with the tests that were seen to do so.

    Both trees have the test patch; each is run as `validate` says. The gold patch's result is that of the right tree.
    Where an instance names its failing tests, those must be among the ones found.
    """
    kept = []
    for task, base in found:
        right = apply_diff(task.right_tree(base), task.test_patch) if task.test_patch else task.right_tree(base)
        faulty = apply_diff(task.faulty_tree(base), task.test_patch) if task.test_patch else task.faulty_tree(base)
        try:
            baseline = validate.measure(sandbox, origin, right, 2, coverage=False)
            [verdict] = validate.judge(sandbox, origin, baseline, [Trial(faulty, None)], 2)
        except UsageError as error:
            reject(task.id, str(error))
            continue
        missing = set(task.fail_to_pass) - set(verdict.fail_to_pass)
        if not verdict.valid or missing:
            reject(task.id, f"{min(missing)} does not go from failing to passing" if verdict.valid else verdict.reason)
            continue
        failing = set(verdict.fail_to_pass) | set(verdict.unreliable)
        passing = tuple(test for test in baseline.reliable if test not in failing)
        kept.append((task.model_copy(update={"fail_to_pass": verdict.fail_to_pass, "pass_to_pass": passing}), base))
    return kept


def write_set(out: Path, spec: SweSpec, made: Sequence[tuple[SweTask, Tree]]) -> None:
    """The folder of a set (see `tasks`); `tasks.jsonl` last, so that without it the folder is not one."""
    for task, base in made:
        place = out / "sources" / task.source
        place.mkdir(parents=True, exist_ok=True)
        if not (place / f"{task.base}.tar.gz").exists():
            write_tree(place / f"{task.base}.tar.gz", base)
            write_tests(place / f"{task.base}.json", ())
    out.mkdir(parents=True, exist_ok=True)
    write_environments(out, {name: environment.requirements for name, environment in spec.environments.items()})
    write_text(out / "tasks.jsonl", "".join(dump(task) + "\n" for task, _ in made))


if __name__ == "__main__":
    main()
