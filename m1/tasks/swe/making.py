"""Rows of software-engineering tasks for a data set, and the set of tasks they belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from m1 import chat, paths
from m1.config.families import SweTasks
from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.errors import ServiceError
from m1.tasks.base import Made, Row, Wish
from m1.tasks.swe import make as sets
from m1.tasks.swe import sources
from m1.tasks.swe.answers import make_blocks
from m1.tasks.swe.prompts import question
from m1.tasks.swe.sources import SweSpec
from m1.tasks.swe.tasks import SET, SweTask, TaskSet
from m1.tokenizer import Tokenizer, load_tokenizer

LEFT_OUT = "swe: skipped: no engine; infra/sandbox/engine.sh starts one, and the next run makes the tasks"


def make(wish: Wish) -> Made:
    """The questions of a split; the set of tasks is put into the folder `swe` of the data set.

    The set is made in the state folder first, where an interrupted run finds what it has validated.

    Raises:
        UsageError: no tokenizer, no such source, or its tests cannot be run.
        ServiceError: no usable engine, and the profile does not allow leaving the tasks out.
    """
    section = wish.profile.section("synthesize", Synthesize).swe
    assert section is not None
    try:
        if not (wish.folder / SET).exists() and not _complete(wish.profile, section) and wish.tools is None:
            if section.when_no_engine == "fail":
                raise ServiceError(
                    "synthesize: no engine answers, and synthesize.swe.when_no_engine is fail",
                    "Start one with infra/sandbox/engine.sh, or set it to skip.",
                )
            return _left_out(wish, LEFT_OUT)
        valid = _put_set(wish, section)
    except sets.NoSandbox as error:
        if section.when_no_engine == "fail":
            raise
        return _left_out(wish, f"swe: skipped: {error}")
    tasks = TaskSet(wish.folder / SET)
    wanted = [task for task in tasks.tasks if task.split == wish.split]
    tokenizer = load_tokenizer(paths.data_dir(wish.profile.name, "tokenizer"))
    rows = questions(tasks, wanted, _wanted(wish.profile, section)[0], tokenizer, section.question_length)
    wish.taken.update(row.id for row in rows)
    return Made(rows, {"rows": len(rows), "valid": valid})


def _left_out(wish: Wish, sentence: str) -> Made:
    print(f"{wish.purpose}: {sentence}", flush=True)
    return Made([], {}, (sentence,))


def _wanted(profile: Profile, section: SweTasks) -> tuple[SweSpec, sets.Options, Path]:
    """The spec, how the set is made, and its folder below the state folder."""
    spec = sources.load(paths.DATA_SPECS / f"{section.spec}.yaml")
    options = sets.Options(
        limit=section.faults_per_package, seed=profile.seed, report=lambda line: print(f"swe: {line}", flush=True)
    )
    return spec, options, paths.STATE / "swe" / sets.set_id(spec, section.packages, options)


def _complete(profile: Profile, section: SweTasks) -> list[dict[str, JsonValue]]:
    """Summaries of a set that is there with all its sources, which needs no engine any more; empty if it is not."""
    spec, _, folder = _wanted(profile, section)
    names = section.packages or [origin.name for origin in spec.origins]
    files = [sets.shard(folder, name) / "summary.json" for name in names]
    # The last file that is written, when all sources are there or have failed.
    if not (folder / "environments.json").is_file() or not all(file.is_file() for file in files):
        return []
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _put_set(wish: Wish, section: SweTasks) -> int:
    """Make sure that the data set holds the set of tasks; the number of its valid faults."""
    spec, options, made = _wanted(wish.profile, section)
    summaries = _complete(wish.profile, section)
    if not summaries:
        assert wish.tools is not None
        summaries = sets.make_set(wish.tools.sandboxes(), spec, section.packages, made, options)
    if not (wish.folder / SET).exists():
        shutil.copytree(made, wish.folder / SET, ignore=shutil.ignore_patterns(".*", "timing.json"))
    return sum(int(str(summary["valid"])) for summary in summaries)


def questions(tasks: TaskSet, wanted: Sequence[SweTask], spec: SweSpec, tokenizer: Tokenizer, window: int) -> list[Row]:
    """Rows of some tasks of a set.

    Args:
        spec: says which of a source's files may be shown.
        window: tokens of a question.
    """
    is_code = {origin.name: origin.is_code for origin in spec.origins}
    rows = []
    for task in wanted:
        faulty = tasks.faulty(task)
        asked = question(
            task, faulty, is_code[task.source], window=window, count=lambda text: len(tokenizer.encode(text))
        )
        rows.append(_row(task, asked, tasks))
    return rows


def _row(task: SweTask, asked: str, tasks: TaskSet) -> Row:
    """`state` finds the task in the set, `answer` is one that is right, if there is."""
    answer = ""
    if task.kind == "repair":
        answer = make_blocks(tasks.faulty(task), tasks.right(task))
    elif task.kind == "localise":
        answer = "\n".join(f"{path}: {element}" for path, element in task.locations)
    return Row(
        id=task.id,
        family="swe",
        task=task.kind,
        difficulty=max(1, len(task.mutations)),
        question=asked,
        prompt=chat.render_prompt(asked),
        answer=answer,
        state={"set": SET, "task": task.id},
    )
