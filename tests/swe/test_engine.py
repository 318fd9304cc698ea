"""Tasks made, judged and continued through the real sandbox: a package of 455 tests, a few faults."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.sandbox import Sandbox
from infra.sandbox.images import build_environment
from m1 import paths
from m1.errors import M1Error, UsageError
from m1.run import profiles
from m1.tasks.prompts import read_rows
from m1.tasks.swe import make as swe_run
from m1.tasks.swe import sources
from m1.tasks.swe.answers import apply_answer, make_blocks
from m1.tasks.swe.ingest import PullRequest, task_of_pull
from m1.tasks.swe.issue_text import leak
from m1.tasks.swe.make import Options, assemble, make_shard, table
from m1.tasks.swe.patches import make_diff
from m1.tasks.swe.reward import LIMITS, End, judge
from m1.tasks.swe.sources import Repository, SweSpec
from m1.tasks.swe.tasks import TaskSet, check_patches, write_environments
from m1.tokenizer import load_tokenizer
from stages.swe.ingest_run import validated, write_set
from stages.swe.predictions import evaluate
from stages.synthesize.run import run as synthesize
from stages.tokenizer.train import save, train
from tests.needed import need_engine
from tests.swe.packages import tree

NAME, CODE = "inflection", "inflection/__init__.py"
LIMIT = 3


@pytest.fixture(scope="module")
def spec() -> SweSpec:
    whole = sources.load(paths.DATA_SPECS / "swe.yaml")
    return whole.model_copy(update={"packages": [p for p in whole.packages if p.name == NAME], "repositories": []})


@pytest.fixture(scope="module")
def sandbox(spec: SweSpec) -> Iterator[Sandbox]:
    need_engine()
    tree(NAME)  # skips where there is no source
    try:
        opened = Sandbox(image=build_environment("default", spec.environments["default"].requirements), limits=LIMITS)
    except M1Error as error:
        pytest.skip(f"no sandbox here: {error}")
    with opened:
        yield opened


class Stopped(BaseException):
    """Stands for a kill between two chunks."""


@pytest.fixture(scope="module")
def made(sandbox: Sandbox, spec: SweSpec, tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    """A set that was interrupted after its first chunk and then continued."""
    out = tmp_path_factory.mktemp("set")

    def stop(line: str) -> None:
        raise Stopped

    patch = pytest.MonkeyPatch()
    patch.setattr(swe_run, "CHUNK", 2)
    with pytest.raises(Stopped):
        make_shard(sandbox, spec, spec.packages[0], out, Options(limit=LIMIT, report=stop))
    assert not (out / "sources" / NAME).exists() and not (out / "tasks.jsonl").exists()
    journal = out / "sources" / f".{NAME}" / "journal.jsonl"
    before = journal.read_text()
    assert len(before.splitlines()) == 1 + 1 + 2  # settings, baseline, one chunk
    journal.write_text(before + '{"key": "cut o')

    class Counting:
        jobs = 0

        def run_many(self, jobs, workers: int = 2):
            Counting.jobs += len(jobs)
            return sandbox.run_many(jobs, workers)

    summary = make_shard(Counting(), spec, spec.packages[0], out, Options(limit=LIMIT))
    assert summary["valid"] == LIMIT and summary["tests"] == 455
    patch.undo()
    assert 0 < Counting.jobs <= 3 * (summary["candidates"] - 1)  # nothing of the first chunk, no baseline
    assemble(out, [summary])
    write_environments(out, {"default": spec.environments["default"].requirements})
    assert f"| {NAME} | train | {summary['candidates']} | {LIMIT} |" in table(out, [summary])
    return TaskSet(out)


def test_a_complete_shard_is_not_made_again_and_other_settings_are_refused(made: TaskSet, spec: SweSpec) -> None:
    package = spec.packages[0]
    again = make_shard(None, spec, package, made.folder, Options(limit=LIMIT))  # type: ignore[arg-type]
    assert again["valid"] == LIMIT
    with pytest.raises(UsageError, match="other settings"):
        make_shard(None, spec, package, made.folder, Options(limit=LIMIT, seed=1))  # type: ignore[arg-type]


def test_tasks_are_whole_and_show_nothing_of_the_patch(made: TaskSet) -> None:
    assert len(made.tasks) == 3 * LIMIT and len({task.id for task in made.tasks}) == 3 * LIMIT
    for task in made.tasks:
        assert check_patches(task, made.base(task)) == ""
        assert made.right(task) == tree(NAME) != made.faulty(task)
        assert task.fail_to_pass and len(task.fail_to_pass) + len(made.pass_to_pass(task)) == 455
        assert not leak(task.issue, task.gold_patch)


def test_ends_of_a_repair(made: TaskSet, sandbox: Sandbox) -> None:
    task = made.tasks[0]
    faulty, right = made.faulty(task), made.right(task)

    def end(tree_: dict[str, bytes]) -> End:
        return judge(sandbox, made, task, make_diff(faulty, tree_)).end

    gold = judge(sandbox, made, task, task.gold_patch)
    assert gold.resolved and gold.value == 1.0 and gold.fixed == len(task.fail_to_pass)
    assert judge(sandbox, made, task, make_blocks(faulty, right)).resolved
    assert end({**faulty, CODE: faulty[CODE] + b"\nX = 1\n"}) is End.UNRESOLVED
    broken = b"\ndef underscore(word):\n    return word\n\n\ndef titleize(word):\n    return word\n"
    assert end({**right, CODE: right[CODE] + broken}) is End.REGRESSION
    assert end({**right, CODE: right[CODE] + b"\nimport os\nos._exit(0)\n"}) is End.RUNTIME_ERROR
    assert end({**right, CODE: right[CODE] + b"\nraise ValueError\n"}) is End.RUNTIME_ERROR
    assert end({**right, CODE: right[CODE] + b"\ndef (:\n"}) is End.COMPILE_ERROR


def test_a_written_test_is_run_on_both_trees(made: TaskSet, sandbox: Sandbox) -> None:
    task = next(task for task in made.tasks if task.kind == "write-test")
    tests = tree(NAME)["test_inflection.py"].decode()
    assert judge(sandbox, made, task, f"```python\n{tests}```").end is End.RESOLVED
    assert judge(sandbox, made, task, "def test_x():\n    import inflection\n").end is End.UNRESOLVED
    assert judge(sandbox, made, task, "def test_x():\n    assert False\n").end is End.RUNTIME_ERROR


def test_predictions_are_judged_in_the_sandbox(made: TaskSet, sandbox: Sandbox) -> None:
    repairs = [task for task in made.tasks if task.kind == "repair"]
    predictions = {repairs[0].id: ("gold", repairs[0].gold_patch), repairs[1].id: ("other", repairs[0].gold_patch)}
    report = evaluate(made.tasks, predictions, lambda task, patch: judge(sandbox, made, task, patch))
    assert report["resolved_ids"] == [repairs[0].id] and report["total_instances"] == LIMIT


def test_a_real_commit_taken_back_makes_a_task(sandbox: Sandbox, spec: SweSpec, tmp_path: Path) -> None:
    right = tree(NAME)
    old = {**right, CODE: right[CODE].replace(b"string[0].lower() +", b"string[0].upper() +")}
    new = {**right, "test_inflection.py": right["test_inflection.py"] + b"\n\ndef test_more():\n    pass\n"}
    clone = tmp_path / "clone"
    for number, files in enumerate((old, new)):
        for path, content in files.items():
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            (clone / path).write_bytes(content)
        for command in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-q", "-m", str(number)]):
            who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
            subprocess.run(["git", *who, "-C", clone, *command], check=True)
    origin = Repository(name="clone", licence="MIT", code=[NAME], tests=["test_inflection.py"], path=str(clone))
    summary = make_shard(sandbox, spec, origin, tmp_path / "out", Options(limit=1))
    assert (summary["candidates"], summary["valid"]) == (1, 1)
    assemble(tmp_path / "out", [summary])
    made = TaskSet(tmp_path / "out")
    task = made.tasks[0]
    assert task.origin == "commit" and task.locations == ((CODE, "camelize"),)
    assert made.faulty(task)[CODE] == old[CODE] and made.right(task) == new
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"] == 3
    assert judge(sandbox, made, task, task.gold_patch).resolved

    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    pull = task_of_pull(PullRequest(9, commit.stdout.strip(), ((7, "camelize is wrong", ""),)), origin)
    assert pull is not None
    told: list[str] = []
    unlike = pull[0].model_copy(update={"id": "unlike", "fail_to_pass": ("test_inflection.py::test_more",)})
    found = validated(sandbox, origin, [pull, (unlike, pull[1])], lambda name, reason: told.append(name))
    assert told == ["unlike"] and found[0][0].fail_to_pass == task.fail_to_pass
    write_set(tmp_path / "pulls", spec, found)
    [ingested] = (pulls := TaskSet(tmp_path / "pulls")).tasks
    assert ingested.issue == "# camelize is wrong\n" and "test_inflection.py::test_more" in pulls.pass_to_pass(ingested)
    assert judge(sandbox, pulls, ingested, ingested.gold_patch).resolved


def test_the_synthesize_stage_writes_questions_with_right_answers(
    made: TaskSet, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {"packages": [NAME], "faults_per_package": LIMIT, "question_length": 3000}
    settings = profiles.load("tiny", overrides={"seed": 0, "synthesize.swe": part, "evaluate.swe": None})
    monkeypatch.setattr(paths, "data_dir", lambda profile, stage: tmp_path / stage)
    monkeypatch.setattr(paths, "STATE", tmp_path / "state")
    folder, cold_start, output = (tmp_path / name for name in ("tokenizer", "sft-data", "synthesize"))
    for each in (folder, cold_start, output):
        each.mkdir()
    save(train([content.decode() for path, content in tree(NAME).items() if path.endswith(".py")], 600), folder)
    for split in ("train", "heldout"):
        (cold_start / f"{split}.jsonl").write_text("")
    whole = sources.load(paths.DATA_SPECS / "swe.yaml")
    shutil.copytree(made.folder, paths.STATE / "swe" / swe_run.set_id(whole, [NAME], Options(limit=LIMIT)))
    summary = synthesize(settings, output)
    assert summary["swe"] == {"train": {"rows": 3 * LIMIT, "valid": LIMIT}, "heldout": {"rows": 0, "valid": LIMIT}}
    assert "left_out" not in summary and "notes" not in summary
    tokenizer = load_tokenizer(folder)
    written = TaskSet(output / "swe")
    by_id = {task.id: task for task in written.tasks}
    rows = {split: [row for row in read_rows(output / f"{split}.jsonl") if row.family == "swe"]
            for split in ("train", "heldout")}  # fmt: skip
    assert sorted(str(row.state["task"]) for row in rows["train"]) == sorted(by_id) and not rows["heldout"]
    for row in rows["train"]:
        task = by_id[str(row.state["task"])]
        assert row.task == task.kind
        assert task.issue in row.question and len(tokenizer.encode(row.question)) <= 3000
        if task.kind == "repair":
            assert apply_answer(written.faulty(task), row.answer) == written.right(task)
        if task.kind == "localise":
            assert judge(sandbox, written, task, row.answer).resolved
    assert not list(output.rglob("timing.json")) and not list(output.rglob("journal.jsonl"))
