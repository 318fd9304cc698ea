"""Evaluate a predictions file: python -m stages.swe.predictions --tasks DIR --predictions FILE --out report.json.

The file is in SWE-bench's format, and the report has the keys that its harness writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.sandbox import Sandbox
from infra.sandbox.images import build_environment
from m1.errors import M1Error
from m1.files import write_json, write_rows
from m1.rows import Reject, read_objects, require_any, shown, summary
from m1.streams import make_readable
from m1.tasks.swe.reward import LIMITS, End, Judgement, judge
from m1.tasks.swe.tasks import SweTask, TaskSet


def read_predictions(
    file: Path, reject: Callable[[str, str], None] = lambda name, reason: None
) -> dict[str, tuple[str, str]]:
    """(model, patch) by instance id, of a .jsonl, or of a .json with a list or an object by instance id.

    Args:
        reject: of rows that are no predictions, with the reason. Of two for an instance neither is taken.

    Raises:
        UsageError: the file cannot be read, or not one row is a prediction.
    """
    read = read_objects(file)
    rejected = list(read.rejected)
    found: dict[str, tuple[str, str]] = {}
    twice: set[str] = set()
    for place, row in read.good:
        name: Any = row.get("instance_id", place if read.named else None)
        fault = _fault(row, name, place if read.named else None)
        if fault:
            rejected.append(Reject(place, fault))
        elif name in found or name in twice:
            twice.add(name)
            rejected.append(Reject(name, "two predictions for it: neither is judged"))
            found.pop(name, None)
        else:
            found[name] = (row.get("model_name_or_path") or "", row["model_patch"] or "")
    for each in rejected:
        reject(each.id, each.reason)
    require_any(file, len(found), rejected)
    return found


def _fault(row: Mapping[str, Any], name: object, key: str | None) -> str:
    """Why a row is no prediction; empty if it is one."""
    if not isinstance(name, str) or not name or "model_patch" not in row:
        return "it has no instance_id or no model_patch"
    if key is not None and name != key:
        return f"it stands under {shown(key)} and says {shown(name)}"
    for field in ("model_patch", "model_name_or_path"):
        if row.get(field) is not None and not isinstance(row[field], str):
            return f"its {field} is not text but {shown(row[field])}"
    return ""


def evaluate(
    tasks: Sequence[SweTask],
    predictions: Mapping[str, tuple[str, str]],
    judged_by: Callable[[SweTask, str], Judgement],
) -> dict[str, Any]:
    """Judge every prediction and count. Predictions for unknown instances are listed, not judged.

    `error_ids` are those whose patch could not be applied, as in SWE-bench's harness; `ends` tells all ends apart.
    """
    by_id = {task.id: task for task in tasks if task.kind == "repair"}
    ends: dict[str, list[str]] = {end.value: [] for end in End}
    for instance in sorted(predictions.keys() & by_id.keys()):
        judged = judged_by(by_id[instance], predictions[instance][1])
        ends[judged.end.value].append(instance)
    submitted = sorted(predictions.keys() & by_id.keys())
    empty, error = ends[End.EMPTY.value], ends[End.BAD_PATCH.value]
    completed = [instance for instance in submitted if instance not in {*empty, *error}]
    resolved = ends[End.RESOLVED.value]
    ids = {
        "completed_ids": completed,
        "incomplete_ids": sorted(by_id.keys() - predictions.keys()),
        "empty_patch_ids": empty,
        "submitted_ids": submitted,
        "resolved_ids": resolved,
        "unresolved_ids": [instance for instance in completed if instance not in set(resolved)],
        "error_ids": error,
    }
    return {
        "total_instances": len(by_id),
        "submitted_instances": len(submitted),
        "completed_instances": len(completed),
        "resolved_instances": len(resolved),
        "unresolved_instances": len(ids["unresolved_ids"]),
        "empty_patch_instances": len(empty),
        "error_instances": len(error),
        **ids,
        "unknown_ids": sorted(predictions.keys() - by_id.keys()),
        "ends": ends,
        "schema_version": 2,
    }


def in_sandbox(tasks: TaskSet, predictions: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The report of `evaluate`, with every patch judged in the sandbox.

    Raises:
        M1Error: no engine, or the sandbox failed.
    """
    sandboxes: dict[str, Sandbox] = {}

    def judged_by(task: SweTask, patch: str) -> Judgement:
        if task.environment not in sandboxes:
            image = build_environment(task.environment, tasks.environments[task.environment])
            sandboxes[task.environment] = Sandbox(image=image, warm=1, limits=LIMITS)
        return judge(sandboxes[task.environment], tasks, task, patch)

    try:
        return evaluate(tasks.tasks, predictions, judged_by)
    finally:
        for sandbox in sandboxes.values():
            sandbox.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=Path, required=True, help="folder of a set of tasks")
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="report, written as JSON")
    options = parser.parse_args(argv)
    make_readable()
    rejected: list[Reject] = []
    where = options.out.with_suffix(".rejected.jsonl")
    try:
        predictions = read_predictions(options.predictions, lambda *each: rejected.append(Reject(*each)))
        report = in_sandbox(TaskSet(options.tasks), predictions)
        report["rejected_predictions"] = len(rejected)
        if rejected:
            write_rows(where, [asdict(each) for each in rejected])
            print(summary(rejected, where), file=sys.stderr)
    except M1Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    write_json(options.out, report)
    print(f"{report['resolved_instances']} of {report['total_instances']} instances resolved; see {options.out}")


if __name__ == "__main__":
    main()
