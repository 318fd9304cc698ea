"""The software-engineering part of the stage: a set of tasks, and its questions as rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from m1 import chat, paths
from m1.profile import Profile, SweTasks
from m1.tokenizer import load_tokenizer
from stages.swe import run, sources
from stages.swe.patches import make_blocks
from stages.swe.prompts import question
from stages.swe.tasks import SweTask, TaskSet


def write_swe(settings: Profile, section: SweTasks, output: Path) -> dict[str, Any]:
    """Write the set `swe/` and its questions, `swe-train.jsonl` and `swe-heldout.jsonl`, into `output`.

    The set itself is made in the state folder first, where an interrupted run finds what it has validated.

    Raises:
        UsageError: no such source, or its tests cannot be run; ServiceError: no sandbox.
    """
    spec = sources.load(paths.DATA_SPECS / f"{section.spec}.yaml")
    options = run.Options(limit=section.faults_per_package, seed=settings.seed)
    made = paths.STATE / "swe" / run.set_id(spec, section.packages, options)
    summaries = run.make_set(spec, section.packages, made, options)
    shutil.copytree(made, output / "swe", ignore=shutil.ignore_patterns(".*", "timing.json"))
    tasks = TaskSet(output / "swe")
    origins = {origin.name: origin for origin in spec.origins}
    tokenizer = load_tokenizer(paths.data_dir(settings.name, "tokenizer"))
    rows: dict[str, list[str]] = {"train": [], "heldout": []}
    for task in tasks.tasks:
        asked = question(
            task,
            tasks.faulty(task),
            origins[task.source].is_code,
            window=section.question_length,
            count=lambda text: len(tokenizer.encode(text)),
        )
        rows[task.split].append(json.dumps(_row(task, asked, tasks)))
    for split, lines in rows.items():
        (output / f"swe-{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return {"rows": {split: len(lines) for split, lines in rows.items()}, "valid": sum(s["valid"] for s in summaries)}


def _row(task: SweTask, asked: str, tasks: TaskSet) -> dict[str, Any]:
    """As the rows of the other tasks; `state` finds the task in the set, `answer` is one that is right, if there is."""
    answers = {
        "repair": lambda: make_blocks(tasks.faulty(task), tasks.right(task)),
        "localise": lambda: "\n".join(f"{path}: {element}" for path, element in task.locations),
        "write-test": lambda: "",
    }
    return {
        "id": task.id,
        "task": f"swe-{task.kind}",
        "difficulty": max(1, len(task.mutations)),
        "question": asked,
        "prompt": chat.render_prompt(asked),
        "answer": answers[task.kind](),
        "state": {"set": "swe", "task": task.id},
    }
