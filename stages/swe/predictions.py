"""Evaluate a predictions file: python -m stages.swe.predictions --tasks DIR --predictions FILE --out report.json.

The file is in SWE-bench's format, and the report has the keys that its harness writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.sandbox import Sandbox
from infra.sandbox.images import build_environment
from m1.errors import M1Error, UsageError
from m1.files import write_json
from m1.streams import make_readable
from m1.tasks.swe.reward import LIMITS, End, Judgement, judge
from m1.tasks.swe.tasks import SweTask, TaskSet


def read_predictions(file: Path) -> dict[str, tuple[str, str]]:
    """(model, patch) by instance id, of a .jsonl, or of a .json with a list or an object by instance id.

    Raises:
        UsageError: the file cannot be read, a field is missing, or an instance has two predictions.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
            if isinstance(rows, dict):
                rows = [{"instance_id": key, **row} for key, row in rows.items()]
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "Name a predictions file.") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a predictions file: {error}", "See docs/swe.md for its form.") from error
    found: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("instance_id"), str) or "model_patch" not in row:
            raise UsageError(f"{file}: prediction {number} has no instance_id or model_patch", "Correct it.")
        if row["instance_id"] in found:
            raise UsageError(f"{file}: two predictions for {row['instance_id']}", "Keep one.")
        found[row["instance_id"]] = (str(row.get("model_name_or_path", "")), row["model_patch"] or "")
    return found


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
    try:
        report = in_sandbox(TaskSet(options.tasks), read_predictions(options.predictions))
    except M1Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    write_json(options.out, report)
    print(f"{report['resolved_instances']} of {report['total_instances']} instances resolved; see {options.out}")


if __name__ == "__main__":
    main()
