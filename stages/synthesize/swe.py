"""The software-engineering part of the stage: a set of tasks, and its questions as rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m1 import chat, paths
from m1.profile import Profile, SweTasks
from m1.stage import engine_answers
from m1.tokenizer import Tokenizer, load_tokenizer
from stages.swe import run, sources
from stages.swe.patches import make_blocks
from stages.swe.prompts import question
from stages.swe.tasks import SweTask, TaskSet

LEFT_OUT = "swe: skipped: no engine; infra/sandbox/engine.sh starts one, and the next run makes the tasks"


def make_swe(settings: Profile, section: SweTasks, output: Path) -> dict[str, Any]:
    """The stage's part of the summary: what `write_swe` says, or why nothing was written.

    Raises:
        UsageError, ServiceError: as `write_swe`; and no usable engine, where the profile does not want to go without.
    """
    try:
        if _made(settings, section) or engine_answers("synthesize", settings):
            return {"swe": write_swe(settings, section, output)}
        reason = LEFT_OUT
    except run.NoSandbox as error:
        if section.when_no_engine == "fail":
            raise
        reason = f"swe: skipped: {error}"
    print(f"synthesize: {reason}", flush=True)
    return {"notes": [reason], "left_out": [reason]}


def write_swe(settings: Profile, section: SweTasks, output: Path) -> dict[str, Any]:
    """Write the set `swe/` and its questions, `swe-train.jsonl` and `swe-heldout.jsonl`, into `output`.

    The set itself is made in the state folder first, where an interrupted run finds what it has validated.

    Raises:
        UsageError: no tokenizer, no such source, or its tests cannot be run; ServiceError: no sandbox.
    """
    tokenizer = load_tokenizer(paths.data_dir(settings.name, "tokenizer"))
    spec, options, made = _wanted(settings, section)
    summaries = _made(settings, section) or run.make_set(spec, section.packages, made, options)
    shutil.copytree(made, output / "swe", ignore=shutil.ignore_patterns(".*", "timing.json"))
    tasks = TaskSet(output / "swe")
    is_code = {origin.name: origin.is_code for origin in spec.origins}
    rows = write_questions(tasks, is_code, tokenizer, section.question_length, output)
    return {"rows": rows, "valid": sum(s["valid"] for s in summaries)}


def write_questions(
    tasks: TaskSet, is_code: Mapping[str, Callable[[str], bool]], tokenizer: Tokenizer, window: int, output: Path
) -> dict[str, int]:
    """Write `swe-train.jsonl` and `swe-heldout.jsonl`; returns their numbers of rows.

    Args:
        is_code: by source, which of its files may be shown.
        window: tokens of a question.
    """
    rows: dict[str, list[str]] = {"train": [], "heldout": []}
    for task in tasks.tasks:
        faulty, count = tasks.faulty(task), lambda text: len(tokenizer.encode(text))
        asked = question(task, faulty, is_code[task.source], window=window, count=count)
        rows[task.split].append(json.dumps(_row(task, asked, tasks)))
    for split, lines in rows.items():
        (output / f"swe-{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return {split: len(lines) for split, lines in rows.items()}


def _wanted(settings: Profile, section: SweTasks) -> tuple[sources.SweSpec, run.Options, Path]:
    """The spec, how the set is made, and its folder below the state folder."""
    spec = sources.load(paths.DATA_SPECS / f"{section.spec}.yaml")
    options = run.Options(
        limit=section.faults_per_package, seed=settings.seed, report=lambda line: print(f"swe: {line}", flush=True)
    )
    return spec, options, paths.STATE / "swe" / run.set_id(spec, section.packages, options)


def _made(settings: Profile, section: SweTasks) -> list[dict[str, Any]]:
    """Summaries of a set that is there with all its sources, which needs no engine any more; empty if it is not."""
    spec, _, folder = _wanted(settings, section)
    names = section.packages or [origin.name for origin in spec.origins]
    files = [run.shard(folder, name) / "summary.json" for name in names]
    # The last file that is written, when all sources are there or have failed.
    if not (folder / "environments.json").is_file() or not all(file.is_file() for file in files):
        return []
    return [json.loads(file.read_text()) for file in files]


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
