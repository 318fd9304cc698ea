"""The two data stages: what they write, that no content is in two sets, and their errors."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from m1 import chat, paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run import profiles
from m1.tasks.base import Row, Verdict
from m1.tasks.logic import TASKS, draw
from m1.tasks.logic.judging import score
from m1.tasks.prompts import read_rows
from stages.sft_data.run import run as run_sft_data
from stages.synthesize.run import run as run_synthesize

LEVELS = (1, 2, 3)
ALL_TASKS = {name: {"max_difficulty": max(LEVELS)} for name in TASKS}
SMALL = {
    "sft-data.tasks": ALL_TASKS,
    "synthesize.tasks": ALL_TASKS,
    "sft-data.samples_per_task": 60,
    "synthesize.train_prompts_per_task": 20,
    "synthesize.heldout_prompts_per_task": 7,
    "synthesize.swe": None,
    "evaluate.swe": None,
}


def settings_of(**overrides: Any) -> Profile:
    return profiles.load("tiny", overrides={**SMALL, **{k.replace("__", "."): v for k, v in overrides.items()}})


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def make(stage: str, settings: Profile) -> Path:
    output = paths.data_dir(settings.name, stage)
    output.mkdir(parents=True, exist_ok=True)
    (run_sft_data if stage == "sft-data" else run_synthesize)(settings, output)
    return output


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of `data/` in the checkout."""
    monkeypatch.setattr(paths, "data_dir", lambda profile, stage: tmp_path / profile / stage)
    return tmp_path


def test_rows_splits_and_levels(root: Path) -> None:
    settings = settings_of()
    sft, rl = make("sft-data", settings), make("synthesize", settings)
    sets = {f"{d.name}/{f}": rows(d / f"{f}.jsonl") for d in (sft, rl) for f in ("train", "heldout")}
    expected = {"sft-data/train": 59, "sft-data/heldout": 1, "synthesize/train": 20, "synthesize/heldout": 7}
    ids: list[str] = []
    questions: list[str] = []
    for name, content in sets.items():
        assert len(content) == expected[name] * len(TASKS)
        for task in TASKS:
            levels = [r["difficulty"] for r in content if r["task"] == task]
            assert len(levels) == expected[name]
            counts = [levels.count(level) for level in LEVELS]
            assert max(counts) - min(counts) <= 1 and sum(counts) == len(levels)
        for r in content:
            worked = name.startswith("sft")
            assert set(r) == {field.name for field in fields(Row)} - (set() if worked else {"response"})
            assert r["family"] == "logic" and r["prompt"] == chat.render_prompt(r["question"])
            response = r["response"] if worked else chat.render_response("", r["answer"])
            assert score(Row(**r), response) == Verdict(1.0, correct=True, formatted=True)
        ids += [r["id"] for r in content]
        questions += [r["task"] + r["question"] for r in content]
        assert [row.to_json() for row in read_rows(root / "tiny" / f"{name}.jsonl")] == content, "as it is read back"
    assert len(set(ids)) == len(ids) == len(set(questions))
    tasks_in_order = [r["task"] for r in sets["synthesize/train"]]
    assert tasks_in_order != sorted(tasks_in_order)


def test_a_share_of_the_samples_answers_directly(root: Path) -> None:
    written: dict[float, list[dict[str, Any]]] = {}
    for fraction in (0.0, 0.4):
        settings = settings_of(**{"sft-data__direct_fraction": fraction})
        written[fraction] = rows(make("sft-data", settings) / "train.jsonl")
    direct = [r for r in written[0.4] if r["response"].startswith("<think></think><answer>")]
    assert not any(r["response"].startswith("<think></think>") for r in written[0.0])
    assert 0.3 < len(direct) / len(written[0.4]) < 0.5
    changed = [new["id"] for old, new in zip(written[0.0], written[0.4], strict=True) if old != new]
    assert changed == [r["id"] for r in direct], "the other samples are untouched"


def test_same_seed_same_bytes_and_another_seed_differs(root: Path) -> None:
    def everything(settings: Profile) -> dict[str, bytes]:
        folders = make("sft-data", settings), make("synthesize", settings)
        return {f"{d.name}/{f.name}": f.read_bytes() for d in folders for f in sorted(d.iterdir())}

    first = everything(settings_of())
    assert set(first) == {f"{d}/{f}.jsonl" for d in ("sft-data", "synthesize") for f in ("train", "heldout")}
    assert everything(settings_of()) == first
    other = everything(settings_of(seed=4321))
    assert all(other[name] != first[name] for name in first)


def test_heldout_does_not_depend_on_the_number_of_training_prompts_or_on_other_tasks(root: Path) -> None:
    make("sft-data", settings_of())
    before = (make("synthesize", settings_of()) / "heldout.jsonl").read_bytes()
    again = make("synthesize", settings_of(synthesize__train_prompts_per_task=200)) / "heldout.jsonl"
    assert again.read_bytes() == before
    alone = settings_of(synthesize__tasks={"operation": {"max_difficulty": 3}})
    only = rows(make("synthesize", alone) / "heldout.jsonl")
    whole = {line for line in before.decode().splitlines() if json.loads(line)["task"] == "operation"}
    assert {json.dumps(r, sort_keys=True) for r in only} == whole


def test_unknown_task_and_empty_mapping_are_refused_when_the_profile_is_read() -> None:
    for section in ("sft-data", "synthesize"):
        with pytest.raises(UsageError, match=rf"{section}\.tasks: there is no task 'sudoku'; choose from arithmetic"):
            settings_of(**{f"{section}.tasks": {"sudoku": {"max_difficulty": 1}}})
        with pytest.raises(UsageError, match=rf"{section}\.tasks: .*'arithmetics'; did you mean arithmetic\?"):
            settings_of(**{f"{section}.tasks": {"arithmetics": {"max_difficulty": 1}}})
        with pytest.raises(UsageError, match=rf"{section}\.tasks is empty; name at least one of arithmetic"):
            settings_of(**{f"{section}.tasks": {}})


def test_missing_and_damaged_sft_data_are_named(root: Path) -> None:
    with pytest.raises(UsageError, match=r"sft-data/heldout.jsonl is not there.*stages.sft_data --profile tiny"):
        make("synthesize", settings_of())
    folder = make("sft-data", settings_of())
    for name in ("heldout", "train"):
        file = folder / f"{name}.jsonl"
        whole = file.read_text()
        file.write_text(whole[:-50] if name == "heldout" else whole.replace('"id"', '"key"', 1))
        with pytest.raises(UsageError, match=rf"{name}.jsonl.* is damaged.*stages.sft_data --profile tiny"):
            make("synthesize", settings_of())
        file.write_text(whole)
    (folder / "train.jsonl").unlink()
    with pytest.raises(UsageError, match=r"sft-data/train.jsonl is not there"):
        make("synthesize", settings_of())


def test_rows_of_an_older_form_are_named(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    whole = TASKS["arithmetic"].generate(random.Random(1), 1).row(with_response=False).to_json()
    for changed in ({**whole, "score": 1}, {k: v for k, v in whole.items() if k != "family"}):
        file.write_text(json.dumps(whole) + "\n" + json.dumps(changed) + "\n")
        with pytest.raises(UsageError, match=r"train\.jsonl:2 is not a row of tasks: it has .*\. Make it again"):
            read_rows(file, "Make it again.")


def test_a_level_that_runs_dry_is_named_and_leaves_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "PATIENCE", 20)
    one = {"arithmetic": {"max_difficulty": 1}}
    settings = settings_of(**{"sft-data.tasks": one, "sft-data.samples_per_task": 100_000})
    with pytest.raises(UsageError, match=r"arithmetic, difficulty 1: too few different problems"):
        make("sft-data", settings)
    assert not (paths.data_dir("tiny", "sft-data") / "train.jsonl").exists()


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(UsageError, match=r"sft-data\.samples_per_task=1 leaves nothing to hold out"):
        settings_of(**{"sft-data.samples_per_task": 1})
