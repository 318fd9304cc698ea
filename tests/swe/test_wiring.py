"""Software-engineering tasks in the pipeline: what a profile may ask, rewards, resolved rates, and no engine.

The answers that a model of this size cannot give are put in its place; sandbox, stages and ranks are the real ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from infra import tools
from infra.flow_runs import Event
from infra.sandbox import DockerSandboxes, Sandbox, engine, images
from m1 import chat, paths
from m1.config.families import FamilyPrompts
from m1.config.profile import Profile
from m1.config.rl import Rewards
from m1.errors import ServiceError, UsageError
from m1.files import read_lines
from m1.planning import preflight
from m1.rollout.engine import Rollout
from m1.run import profiles
from m1.run.contract import StageContext, StageRequest, Upstream, load_result
from m1.run.folder import prepare, read_metrics
from m1.run.identity import files_of, fingerprint, modules_of
from m1.run.registry import stage
from m1.run.resolve import families_left_out
from m1.run.stage import Demand, Need
from m1.run.summary import StageRow
from m1.tasks.asking import Pool, opened
from m1.tasks.base import Made, Row, Verdict, Wish
from m1.tasks.families import family
from m1.tasks.pass_rate import Answered, accuracy_by_task
from m1.tasks.prompts import Prompt, read_rows, tokenised
from m1.tasks.swe import make as sets
from m1.tasks.swe import sources
from m1.tasks.swe.answers import apply_answer, make_blocks
from m1.tasks.swe.judging import SandboxJudge
from m1.tasks.swe.making import LEFT_OUT
from m1.tasks.swe.reward import ENDS, LIMITS, NO_ANSWER
from m1.tasks.swe.tasks import KINDS, TaskSet
from m1.training.stopping import StopRequested
from stages.evaluate import tables
from stages.evaluate.run import write_samples
from stages.rl.rewards import reward
from stages.rl.rollouts import RolloutWorker, family_metrics
from stages.rl.sampling import MixedSampler, PromptSampler, dynamic_sampling
from tests.needed import need_engine
from tests.swe import mini

NOWHERE = "unix:///nowhere/docker.sock"
MADE = {"faults_per_package": 2, "question_length": 300}
RL = {"share": 0.5, "max_prompt_length": 340, "test_seconds": 60.0}
EVALUATE = {"tasks_per_kind": 2, "max_prompt_length": 340, "max_new_tokens": 12}
SMOKE: dict[str, Any] = {
    "synthesize.swe": MADE, "rl-40k.swe": RL, "evaluate.swe": EVALUATE, "evaluate.prompts_per_task": 1,
    "checkpoints.stop_seconds": 600.0,
}  # fmt: skip

ALONE = {"parallel.world_size": 1}

# --- what a profile may ask ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl-40k.swe": RL}, "rl-40k.swe: no such tasks are made; give synthesize.swe a value"),
        ({"evaluate.swe": EVALUATE}, "evaluate.swe: no such tasks are made"),
        ({"synthesize.swe": {**MADE, "question_length": 341}, "rl-40k.swe": RL}, "max_prompt_length=340 is below"),
        ({"synthesize.swe": MADE, "rl-80k.swe": {**RL, "max_prompt_length": 500}}, "500 with 20 tokens .* exceeds"),
        ({"synthesize.swe": MADE, "rl-40k.swe": {**RL, "share": 0.0}}, "rl-40k.swe.share: .* greater than 0"),
        ({"synthesize.swe": MADE, "rl-40k.swe": {**RL, "part": 0.1}}, "rl-40k.swe.part: unknown field"),
        ({"synthesize.swe": {**MADE, "when_no_engine": "maybe"}}, "when_no_engine: Input should be 'skip' or 'fail'"),
    ],
)
def test_impossible_wishes_are_refused_when_the_profile_is_read(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        profiles.load("smoke", overrides=changes)


def test_the_line_that_waits_in_tiny_is_right(tmp_path: Path) -> None:
    text = (paths.PROFILES / "tiny.yaml").read_text()
    assert text.count("  # swe: {") == 1 and profiles.load("tiny").rl_40k.swe is None
    (tmp_path / "tiny.yaml").write_text(text.replace("  # swe: {", "  swe: {"))
    settings = profiles.load(str(tmp_path / "tiny.yaml"))
    assert settings.rl_40k.swe is not None and settings.rl_40k.swe == settings.rl_80k.swe


@pytest.mark.parametrize("name", ["tiny", "single-gpu", "m1-456b"])
def test_there_is_something_to_train_on_and_something_held_out(name: str) -> None:
    settings = profiles.load(name)
    assert settings.synthesize.swe and settings.evaluate.swe
    spec = sources.load(paths.DATA_SPECS / f"{settings.synthesize.swe.spec}.yaml")
    split = {origin.name: origin.split for origin in spec.origins}
    assert {split[source] for source in settings.synthesize.swe.packages or split} == {"train", "heldout"}


def test_engine_and_code_are_part_of_the_identity_only_where_asked_for() -> None:
    plain, asking = profiles.load("smoke"), profiles.load("smoke", overrides=SMOKE)

    def code(name: str, profile: Profile) -> list[str]:
        return modules_of(stage(name), profile)[0]

    def special(modules: list[str]) -> set[str]:
        return {module for module in modules if module.startswith(("m1.tasks.swe", "infra.sandbox"))}

    for name in ("synthesize", "rl-40k", "evaluate"):
        assert not special(code(name, plain))
        work = "making" if name == "synthesize" else "judging"
        assert {f"m1.tasks.swe.{work}", "m1.tasks.swe.reward", "infra.sandbox.runner"} <= special(code(name, asking))
    assert not special(code("rl-80k", asking)), "its section does not ask"
    files = files_of(code("rl-40k", asking))
    assert all(file.is_file() for file in files)
    inside = {paths.ROOT / "infra" / "sandbox" / "inside", paths.ROOT / "m1" / "tasks" / "swe" / "inside"}
    assert inside <= {file.parent for file in files_of(code("synthesize", asking))}, "what runs in the container, too"

    prints = [fingerprint("rl-40k", asking, {}, left_out=left_out) for left_out in ((), ("swe",))]
    assert len({*prints, fingerprint("rl-40k", plain, {})}) == 3
    assert fingerprint("rl-80k", plain, {}) == fingerprint("rl-80k", asking, {})


def test_a_planned_stage_counts_its_long_prompts() -> None:
    plain, asking = profiles.load("smoke"), profiles.load("smoke", overrides=SMOKE)

    def tokens(profile: Profile, name: str) -> int:
        cost = stage(name).cost(profile)
        assert cost is not None
        return cost.tokens

    responses = plain.rl_40k.train_steps * plain.rl_40k.prompts_per_step * plain.rl_40k.group_size
    more = tokens(asking, "rl-40k") - tokens(plain, "rl-40k")
    assert more == responses * 0.5 * (340 - plain.rl_40k.max_prompt_length)
    one = profiles.load("smoke", overrides={"evaluate.prompts_per_task": 1})
    assert tokens(asking, "evaluate") - tokens(one, "evaluate") == 5 * 3 * 2 * (340 + 12)


# --- which prompts ---


def row_of(name: str, family_name: str, task: str, state: dict[str, Any] | None = None) -> Row:
    return Row(name, family_name, task, 1, "", "", "", state or {})


@pytest.mark.parametrize("share", [0.25, 0.1, 1 / 3, 1.0])
def test_every_batch_has_its_share_and_a_cursor_resumes(share: float) -> None:
    def mixed(cursor: int = 0) -> MixedSampler:
        made = [[Prompt(row_of(f"{name}{i}", name, "task"), [1]) for i in range(7)] for name in ("logic", "swe")]
        return MixedSampler([PromptSampler(each, "5") for each in made], [1 - share, share], cursor)

    def is_swe(prompt: Prompt) -> bool:
        return prompt.row.family == "swe"

    sampler = mixed()
    batches = [sampler.take(12) for _ in range(20)]
    assert [position for batch in batches for position in sorted(p for p, _ in batch)] == list(range(240))
    for batch in batches:
        count = sum(is_swe(prompt) for _, prompt in batch)
        assert abs(count - share * 12) < 1
        assert not any(is_swe(prompt) for _, prompt in batch[: 12 - count]), "they come last"
        by_rank = [sum(is_swe(prompt) for _, prompt in batch[rank::2]) for rank in (0, 1)]
        assert abs(by_rank[0] - by_rank[1]) <= 1
    assert mixed(cursor=12 * 13).take(12) == batches[13]
    swe = [prompt.row.id for batch in batches for _, prompt in sorted(batch, key=lambda p: p[0]) if is_swe(prompt)]
    assert len(set(swe[:7])) == 7, "a pass over all of them before any comes again"


# --- rewards ---


@pytest.fixture(scope="module")
def image() -> str:
    need_engine()
    built = images.build_environment("python", list(images.DEFAULT_REQUIREMENTS), images.build_base("host-python"))
    OTHERS.update(containers(built))
    return built


@pytest.fixture
def sandbox(image: str) -> Iterator[Sandbox]:
    with Sandbox(image, warm=2, limits=LIMITS) as made:
        yield made


@pytest.fixture
def broken(image: str) -> Iterator[Sandbox]:
    """A sandbox whose image has gone since it was opened: no container can be made any more."""
    engine.client().tag(image, "m1-swe-gone", "now")
    with Sandbox("m1-swe-gone:now", warm=0) as made:
        engine.client().remove_image("m1-swe-gone:now")
        yield made


def right(task: Any) -> str:
    answers = {
        "repair": lambda: make_blocks(mini.faulty(task.locations[0][1]), mini.RIGHT),
        "localise": lambda: f"mini.py: {task.locations[0][1]}",
        "write-test": lambda: mini.written_test(task.locations[0][1]),
    }
    return chat.render_response("words", answers[task.kind]())


def wrong(task: Any) -> str:
    answers = {
        "repair": "mini.py\n<<<<<<< SEARCH\ndef double(x):\n=======\ndef double(x, y=1):\n>>>>>>> REPLACE\n",
        "localise": "other.py: nothing",
        "write-test": "def test_it():\n    pass\n",
    }
    return chat.render_response("words", answers[task.kind])


def row(task: Any) -> Row:
    return row_of(task.id, "swe", task.kind, {"task": task.id})


class Said:
    """Stands for the model, and for the tokenizer that reads what it says: prompt i gets the texts i."""

    weight_version = 0

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self.texts = texts

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Any, stop: Any = None
    ) -> list[list[Rollout]]:
        return [
            [Rollout([ids[0], i], [-0.5, -0.5], "stop") for i in range(len(group))]
            for ids, group in zip(prompts, seeds, strict=True)
        ]

    def decode_chat(self, ids: Sequence[int]) -> str:
        return self.texts[ids[0]][ids[1]]


def test_right_wrong_and_a_failed_sandbox_are_one_nothing_and_left_out(
    sandbox: Sandbox, broken: Sandbox, tmp_path: Path
) -> None:
    from m1.training import parallel
    from stages.rl.updates import plan_updates

    good = mini.task("double", "repair", "train")
    test = mini.task("shout", "write-test", "train")
    lost = mini.task("shout", "repair", "train", environment="gone")
    tasks = mini.write_set(tmp_path, [good, test, lost])
    said = Said([
        [right(good), wrong(good), "no answer block", right(good)],
        [wrong(test), right(test), wrong(test), wrong(test)],
        [right(lost), wrong(lost), "no answer block", right(lost)],
    ])  # fmt: skip
    prompts = [Prompt(row(task), [number]) for number, task in enumerate((good, test, lost))]
    judge = SandboxJudge(tasks, {"python": sandbox, "gone": broken}, workers=2)
    pools = {"swe": Pool("swe", prompts, judge, family("swe").ends)}
    settings = profiles.load("smoke", overrides={**ALONE, "rl-40k.prompts_per_step": 3, "rl-40k.updates_per_step": 1})
    section = settings.rl_40k
    assert section.rewards == Rewards(correct=1.0, format=0.1, overlong_cache=4)
    worker = RolloutWorker(said, said, pools, section, "s", NotAsked())  # type: ignore[arg-type]
    parallel.initialize(settings.parallel, 1)
    batch = dynamic_sampling(PromptSampler(prompts, "1"), lambda part: worker.roll_out(part, 40, 4), section)
    parallel.shutdown()
    groups = sorted(batch.generated, key=lambda group: group.prompt.tokens)
    assert [group.prompt for group in groups] == prompts
    assert [reward.total for reward in groups[0].rewards] == pytest.approx([1.1, 0.1, 0.0, 1.1])
    assert [reward.end for reward in groups[0].rewards] == ["resolved", "unresolved", NO_ANSWER, "resolved"]
    assert [reward.total for reward in groups[1].rewards] == pytest.approx([0.1, 1.1, 0.1, 0.1])
    left = groups[2]
    assert [reward.end for reward in left.rewards] == [NO_ANSWER] and len(left.unjudged) == 3
    assert left.texts == ["no answer block"] and [r.tokens for r in left.rollouts] == [[2, 2]]
    assert left.advantages == [0.0] and sorted(batch.groups, key=lambda group: group.prompt.tokens) == groups[:2]
    metrics = family_metrics(batch, pools)
    assert (metrics["swe/responses"], metrics["swe/unjudged"]) == (12, 3)
    assert metrics["swe/resolved"] == pytest.approx(3 / 9) and metrics["swe/resolved/write-test"] == 0.25
    assert metrics["swe/resolved/repair"] == pytest.approx(2 / 5)
    assert metrics["swe/end/resolved"] == 3 and metrics["swe/end/unresolved"] == 4 and metrics["swe/end/no-answer"] == 2
    assert sum(value for name, value in metrics.items() if name.startswith("swe/end/")) == 9
    assert {name for name in metrics if name.startswith("swe/end/")} == {f"swe/end/{end}" for end in ENDS}

    (batches,) = plan_updates(batch.generated, section, seed="s", rank=0, ranks=1)
    assert sum(int(part.loss_mask.sum()) for part in batches) == 9 * 2, "what was left out is not trained on"


def test_a_dead_engine_is_never_a_wrong_answer(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = mini.task("double", "repair", "train")
    tasks = mini.write_set(tmp_path, [task])
    with Sandbox(image, warm=0) as sandbox:
        judge = SandboxJudge(tasks, {"python": sandbox}, workers=2)
        monkeypatch.setenv("DOCKER_HOST", NOWHERE)  # the threads that judge look for their engine now
        [verdict, other] = judge.judge([(row(task), right(task)), (row(task), wrong(task))])
        monkeypatch.undo()
        assert not verdict.judged and not other.judged and "no Docker engine answers" in verdict.message
        assert not verdict.correct and verdict.end == "", "no end of the answer's"
        again = judge.judge([(row(task), right(task))])[0]
        assert again.judged and again.correct and again.end == "resolved"
    with pytest.raises(ValueError, match="not judged has no reward"):
        reward(verdict, 3, window=10, weights=Rewards(overlong_cache=4))


class NotAsked:
    """Nobody has asked the stage to stop."""

    def noticed(self) -> bool:
        return False

    def agreed(self) -> bool:
        return False


def test_judging_is_abandoned_when_the_stage_is_asked_to_stop(image: str, tmp_path: Path) -> None:
    task = mini.task("double", "repair", "train")
    tasks = mini.write_set(tmp_path, [task])
    endless = "mini.py\n<<<<<<< SEARCH\ndef double(x):\n=======\ndef double(x):\n    while True: pass\n>>>>>>> REPLACE"

    class Asked:
        """Stands for SIGTERM, which comes once the answer's tests run."""

        def noticed(self) -> bool:
            return bool(sandbox._pool._taken)

        def agreed(self) -> bool:
            return True

    with Sandbox(image, warm=1) as sandbox, pytest.raises(StopRequested):
        judge = SandboxJudge(tasks, {"python": sandbox}, workers=1)
        judge.judge([(row(task), chat.render_response("", endless))], Asked())
    assert not left(image)


def test_a_closed_sandbox_ends_the_jobs_that_run(image: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from infra.sandbox import Job

    sandbox = Sandbox(image, warm=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(sandbox.run, Job({}, ["sleep", "100"]))
        while not sandbox._pool._taken:
            assert not running.done()
        sandbox.close()
        assert isinstance(running.exception(timeout=60), UsageError)  # its second try finds the sandbox closed
    assert not left(image)


def containers(image: str) -> set[str]:
    """Of the image these tests use, running or not."""
    return {found["Id"] for found in engine.client().containers(all=True, filters={"ancestor": image})}


#: Kept warm by sandboxes of other tests in this process.
OTHERS: set[str] = set()


def left(image: str) -> set[str]:
    """Containers that a test of this module has left."""
    return containers(image) - OTHERS


# --- resolved rates ---


def answers_to(judge: SandboxJudge, tasks: TaskSet, answer: Any) -> list[Answered]:
    pairs = [(row(task), answer(task)) for task in tasks.tasks]
    return [Answered(r, [text], [], [verdict]) for (r, text), verdict in zip(pairs, judge.judge(pairs))]


def test_right_answers_resolve_all_and_empty_ones_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    tasks = mini.write_set(tmp_path, [mini.task(name, kind, "heldout") for name in mini.FAULTS for kind in KINDS])
    judge = SandboxJudge(tasks, {"python": sandbox}, workers=2)
    gold = accuracy_by_task(answers_to(judge, tasks, right))
    assert list(gold) == [*sorted(KINDS), "mean"] and all(kind.value == kind.reward == 1.0 for kind in gold.values())
    assert [kind.prompts for kind in gold.values()] == [2, 2, 2, 6] and gold["mean"].ends == (("resolved", 6),)
    empty = accuracy_by_task(answers_to(judge, tasks, lambda task: chat.render_response("", "")))
    assert all(kind.value == 0.0 for kind in empty.values()) and empty["mean"].ends == (("empty", 6),)


def test_unjudged_answers_do_not_count(tmp_path: Path) -> None:
    def answered(kind: str, *verdicts: Verdict) -> Answered:
        return Answered(
            row_of(kind, "swe", kind), ["said"] * len(verdicts), [Rollout([1])] * len(verdicts), [*verdicts]
        )

    good, bad = Verdict(1.0, True, True, "resolved"), Verdict(0.0, False, True, "empty")
    lost = Verdict(float("nan"), False, True, judged=False)
    items = [answered("repair", good, lost), answered("repair", good, bad), answered("localise", lost, lost)]
    table = accuracy_by_task(items)
    assert (table["repair"].value, table["repair"].prompts, table["repair"].unjudged) == (0.75, 2, 1)
    assert (table["localise"].value, table["localise"].prompts, table["localise"].unjudged) == (None, 0, 2)
    assert table["localise"].interval is None and table["localise"].reward is None
    assert (table["mean"].value, table["mean"].ends) == (0.75, (("resolved", 2), ("empty", 1)))
    assert table["mean"].reward == 0.75 and table["mean"].unjudged == 3
    metrics = tables.final_metrics("swe", {"sft": table}, errors=False)
    assert metrics == {"swe/pass@1/sft/repair": 0.75, "swe/pass@1/sft/mean": 0.75, "swe/unjudged/sft": 3.0}
    assert "swe/pass@1_error/sft" in tables.final_metrics("swe", {"sft": table})
    (sentence,) = tables.sentences("swe", {"sft": table})
    assert sentence.startswith("swe: sft: pass@1 0.750, 95% interval ") and "(resolved 2, empty 1)" in sentence
    assert "3 answers could not be judged and do not count" in sentence
    stored = json.loads(json.dumps(tables.as_json({"sft": table})))["sft"]
    assert (stored["localise"]["pass@1"], stored["localise"]["unjudged"]) == (None, 2)
    nothing = accuracy_by_task(items[2:])
    assert tables.sentences("swe", {"sft": nothing}) == ["swe: sft: nothing was judged"]
    write_samples(tmp_path / "samples.jsonl", items)
    shown = [
        [each["correct"] for each in json.loads(line)["responses"]] for line in read_lines(tmp_path / "samples.jsonl")
    ]
    assert shown == [[True, None], [True, False], [None, None]]


# --- the stages ---

SPEC = {
    "description": "one package, made by hand",
    "environments": {"python": {"requirements": list(images.DEFAULT_REQUIREMENTS)}},
    "packages": [
        {"name": "mini", "package": "mini", "version": "1", "sha256": "0" * 64, "licence": "MIT", "code": ["mini.py"],
         "tests": ["test_mini.py"], "environment": "python"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of profile `smoke` with a set, and an untrained parent run, made by the project's own parts.

    The set itself is made by hand and put where the stage looks for one that is complete: no engine is needed.
    """
    from m1.model.hybrid import build_model
    from m1.tasks.logic.draw import draw
    from m1.training import checkpoint, parallel
    from stages.sft_data.run import run as make_sft_data
    from stages.synthesize.run import run as synthesize
    from stages.tokenizer.train import save, train

    root = tmp_path_factory.mktemp("world")
    settings = profiles.load("smoke", overrides={**SMOKE, **ALONE})
    for name in ("sft-data", "tokenizer", "synthesize", "specs"):
        (root / name).mkdir()
    texts = [problem.question for problem in draw(settings.synthesize.tasks, 200, seed=1, purpose="", taken=set())]
    save(train([Path(__file__).read_text(encoding="utf-8"), *texts], settings.model.vocab_size), root / "tokenizer")
    (root / "specs" / "swe.yaml").write_text(yaml.safe_dump(SPEC))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "data_dir", lambda profile, name: root / name)
        patch.setattr(paths, "DATA_SPECS", root / "specs")
        patch.setattr(paths, "STATE", root / "state")
        write_complete_set(settings)
        make_sft_data(settings, root / "sft-data")
        told = synthesize(settings, root / "synthesize")
    assert told["swe"] == {"heldout": {"rows": 6, "valid": 4}, "train": {"rows": 6, "valid": 4}} and "notes" not in told

    parallel.initialize(settings.parallel, 1)
    model = build_model(settings.model, settings.parallel, seed=3)
    with torch.no_grad():
        model.output_layer.weight[3] *= 6.0  # <end_of_sentence>, so that lengths differ
    parent = root / "parent"
    parent.mkdir()
    folder = checkpoint.step_folder(parent / "checkpoints", 1)
    saved = checkpoint.save(folder, model, None, {"step": 1, "rotary_base": settings.model.rotary_base})
    parallel.shutdown()
    made = StageRequest(
        stage="context-extension", profile=settings.to_dict(), fingerprint="a" * 64, output=str(parent), data={},
        data_digests={},
    )  # fmt: skip
    StageContext(made).finish(checkpoint=saved, key_metric="", before=None, after=None, metrics={})
    return root


def write_complete_set(settings: Profile) -> None:
    """A set of `SPEC`, with tasks of both splits, as `make_set` leaves one in the state folder."""
    spec = sources.load(paths.DATA_SPECS / "swe.yaml")
    options = sets.Options(limit=settings.synthesize.swe.faults_per_package, seed=settings.seed)
    folder = paths.STATE / "swe" / sets.set_id(spec, [], options)
    tasks = [mini.task(name, kind, split) for name in mini.FAULTS for kind in KINDS for split in ("train", "heldout")]
    mini.write_set(folder, tasks)
    (sets.shard(folder, "mini") / "summary.json").write_text(json.dumps({"valid": 4}))
    (sets.shard(folder, "mini") / "timing.json").write_text("{}")


def test_rows_of_all_families_stand_in_the_same_files(world: Path) -> None:
    from m1.tokenizer import load_tokenizer

    tokenizer, ids = load_tokenizer(world / "tokenizer"), set()
    tasks = TaskSet(world / "synthesize" / "swe")
    by_id = {task.id: task for task in tasks.tasks}
    for split, plain in (("train", 16), ("heldout", 4)):
        rows = read_rows(world / "synthesize" / f"{split}.jsonl")
        assert [each.family for each in rows] == ["logic"] * 2 * plain + ["swe"] * 6
        assert sorted(each.task for each in rows if each.family == "swe") == sorted([*KINDS, *KINDS])
        assert {each.task for each in rows if each.family == "logic"} == {"arithmetic", "dyck_language"}
        ids |= {each.id for each in rows}
        for each in rows:
            assert each.prompt == chat.render_prompt(each.question) and each.response is None
            if each.family != "swe":
                continue
            task = by_id[str(each.state["task"])]
            assert (task.split, task.kind) == (split, each.task) and each.state["set"] == "swe"
            assert task.issue in each.question and "def double" in each.question
            assert len(tokenizer.encode(each.question)) <= 300 and "test_mini" not in each.question
            if each.task == "repair":
                assert apply_answer(tasks.faulty(task), each.answer) == tasks.right(task)
            assert (each.answer == "") == (each.task == "write-test")
    assert len(ids) == 2 * (16 + 4) + 12, "no task twice"
    assert not list((world / "synthesize").rglob("timing.json")), "the same bytes each time"


def request(
    world: Path, name: str, output: str, left_out: tuple[str, ...] = (), parent: str = "parent", **changes: Any
) -> StageRequest:
    settings = profiles.load("smoke", overrides={**SMOKE, **changes})
    earlier = load_result(world / parent)
    assert earlier is not None
    return StageRequest(
        stage=name,
        profile=settings.to_dict(),
        fingerprint="b" * 64,
        output=str(world / output),
        data={part: str(world / part) for part in ("synthesize", "tokenizer")},
        data_digests={},
        parent=str(world / parent),
        parent_stage=earlier.stage,
        history=(*earlier.request.history, Upstream(stage=earlier.stage, run=str(world / parent))),
        left_out=left_out,
    )


@pytest.fixture(scope="module")
def trained(image: str, world: Path) -> Path:
    """rl-40k, where right answers, wrong ones and ones without form stand in for the model's."""
    from stages.rl.train import run

    ask = SandboxJudge.judge

    def answered(self: SandboxJudge, asked: Sequence[tuple[Row, str]], stop: Any = None) -> list[Verdict]:
        given = [
            (row, (right, wrong, lambda _: "no form")[number % 3](self._by_id[str(row.state["task"])]))
            for number, (row, _) in enumerate(asked)
        ]
        return ask(self, given, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SandboxJudge, "judge", answered)
        run(StageContext(request(world, "rl-40k", "trained", **ALONE)))
    assert not left(image)
    return world / "trained"


def test_rl_trains_on_what_the_sandbox_says(trained: Path) -> None:
    result = load_result(trained)
    assert result is not None and any(figure.endswith("swe_resolved.png") for figure in result.figures)
    assert "swe: 6 of 6 prompts have at most 340 tokens" in result.notes and result.left_out == ()
    steps = [line.metrics for line in read_metrics(trained) if "swe/responses" in line.metrics]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["swe/responses"] == 2 * 4 and metrics["swe/unjudged"] == 0
        # Of eight answers in turn three are right and three wrong; the last two have no form.
        assert metrics["swe/resolved"] == 3 / 8 and metrics["swe/end/resolved"] == 3
        assert metrics["swe/end/no-answer"] == 2
        assert metrics["rl/correct"] == 3 / 16 and metrics["rl/updates"] > 0
        assert metrics["agreement/pearson"] > 0.99, "long prompts are read alike by both engines"
    lines = [json.loads(line) for line in read_lines(trained / "rollouts" / "step_00001.jsonl")]
    assert {line["family"] for line in lines} == {"logic", "swe"} and len(lines) == 16
    assert all("end" not in line for line in lines if line["family"] == "logic")
    lines = [line for line in lines if line["family"] == "swe"]
    assert {line["task"] for line in lines} <= set(KINDS)
    assert [line["end"] for line in lines].count("resolved") == 3
    for line in lines:
        assert line["correct"] == (line["end"] == "resolved")
    by_task = {task: [line["correct"] for line in lines if line["task"] == task] for task in KINDS}
    resolved = {f"swe/resolved/{task}": sum(all_) / len(all_) for task, all_ in by_task.items() if all_}
    assert resolved == {name: value for name, value in steps[0].items() if name.startswith("swe/resolved/")}
    assert any(line["trained_on"] and line["advantage"] > 0 for line in lines if line["correct"])


def test_evaluate_reports_resolved_rates_apart(
    image: str, world: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.evaluate.run import run

    ask = SandboxJudge.judge

    def answered(self: SandboxJudge, asked: Sequence[tuple[Row, str]], stop: Any = None) -> list[Verdict]:
        tasks = [self._by_id[str(row.state["task"])] for row, _ in asked]
        assert {task.split for task in tasks} == {"heldout"}
        given = [(row, text if task.kind == "localise" else right(task)) for task, (row, text) in zip(tasks, asked)]
        return ask(self, given, stop)

    monkeypatch.setattr(SandboxJudge, "judge", answered)
    result = run(StageContext(request(world, "evaluate", "evaluated", parent="trained", **ALONE)))
    assert not left(image)
    for name in ("context-extension", "rl-40k"):
        swe = {task: result.metrics[f"swe/pass@1/{name}/{task}"] for task in (*KINDS, "mean")}
        assert swe == {"repair": 1.0, "write-test": 1.0, "localise": 0.0, "mean": pytest.approx(2 / 3)}
        assert result.metrics[f"swe/unjudged/{name}"] == 0 and f"swe/pass@1_error/{name}" in result.metrics
        mean = sum(result.metrics[f"pass@1/{name}/{task}"] for task in ("arithmetic", "dyck_language")) / 2
        assert result.metrics[f"pass@1/{name}/mean"] == mean, "not mixed"
    assert result.before == result.metrics["pass@1/context-extension/mean"], "the key metric is the plain family's"
    assert result.after == result.metrics["pass@1/rl-40k/mean"]
    table = json.loads((world / "evaluated" / "swe.json").read_text())["rl-40k"]
    assert table["mean"]["prompts"] == 6 and table["mean"]["ends"] == {"resolved": 4, "no-answer": 2}
    plain = json.loads((world / "evaluated" / "pass_at_1.json").read_text())["rl-40k"]
    assert set(plain) == {"arithmetic", "dyck_language", "mean"}
    assert {"figures/pass_at_1.png", "figures/swe_pass_at_1.png"} <= set(result.figures)
    assert any(
        note.startswith("swe: rl-40k: pass@1 0.667, ") and note.endswith("(resolved 4, no-answer 2)")
        for note in result.notes
    )
    assert "swe: 6 of 6 prompts have at most 340 tokens" in result.notes and result.left_out == ()
    samples = read_lines(world / "evaluated" / "samples" / "swe-rl-40k.jsonl")
    assert len(samples) == 6 and {"prompt", "responses"} <= set(json.loads(samples[0]))
    assert {json.loads(line)["task"] for line in samples} == set(KINDS)
    others = read_lines(world / "evaluated" / "samples" / "rl-40k.jsonl")
    assert {json.loads(line)["task"] for line in others} == {"arithmetic", "dyck_language"}


def test_two_ranks_judge_side_by_side_and_leave_nothing_behind(image: str, world: Path) -> None:
    """The stage as the flow starts it: torchrun, two ranks, each with a sandbox of its own."""
    launch(request(world, "rl-40k", "two", **{"rl-40k.train_steps": 1}))
    (metrics,) = [line.metrics for line in read_metrics(world / "two") if "swe/responses" in line.metrics]
    assert metrics["swe/responses"] == 8 == metrics["swe/end/no-answer"] and metrics["rl/tokens"] > 0
    assert not left(image)


def launch(asked: StageRequest, **environment: str) -> str:
    file = prepare(asked.run, asked)
    ranks = str(asked.load_profile().parallel.world_size)
    assert ranks == "2"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
         "-m", stage(asked.stage).package, "--request", str(file)],
        cwd=paths.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# --- no engine ---


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)
    monkeypatch.delattr(engine._local, "client", raising=False)  # what this thread has found before


@pytest.fixture
def no_set(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data of the profile up to synthesis, and no set made yet; an empty folder for what is synthesised."""
    monkeypatch.setattr(paths, "data_dir", lambda profile, name: world / name)
    monkeypatch.setattr(paths, "STATE", tmp_path / "state")
    output = tmp_path / "output"
    output.mkdir()
    return output


def strictly(changes: dict[str, Any] = SMOKE) -> Profile:
    made = {**changes["synthesize.swe"], "when_no_engine": "fail"}
    return profiles.load("smoke", overrides={**changes, "synthesize.swe": made})


def test_without_an_engine_the_set_is_left_out_in_so_many_words(
    no_engine: None, no_set: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from stages.synthesize.run import run

    settings = profiles.load("smoke", overrides=SMOKE)
    summary = run(settings, no_set)
    assert summary["left_out"] == summary["notes"] == [LEFT_OUT] and "swe" not in summary
    assert sorted(file.name for file in no_set.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    for split, count in (("heldout", 4), ("train", 16)):
        rows = read_rows(no_set / f"{split}.jsonl")
        assert {row.family for row in rows} == {"logic"} and len(rows) == 2 * count
    assert capfd.readouterr().out.count("infra/sandbox/engine.sh") == 1, "said, and once"
    wish = Wish(settings, "synthesize", "train", no_set, set())
    assert family("swe").make(wish) == Made([], {}, (LEFT_OUT,))


@pytest.mark.parametrize("name", ["synthesize", "rl-40k", "evaluate"])
def test_a_profile_that_does_not_go_without_the_tasks_is_refused_before_anything_runs(
    no_engine: None, name: str
) -> None:
    lenient, strict = profiles.load("smoke", overrides=SMOKE), strictly()
    preflight.check(lenient, [name], tools.missing)
    assert families_left_out(stage(name).demands(lenient), tools.missing) == ("swe",)
    words = rf"{name}: no Docker engine answers .*without.* tasks of swe.*engine\.sh"
    with pytest.raises(ServiceError, match=words):
        preflight.check(strict, [name], tools.missing)
    preflight.check(strict, ["rl-80k"], tools.missing)  # its section does not ask


def test_an_engine_that_goes_after_that_does_not_leave_the_set_out_either(no_engine: None, no_set: Path) -> None:
    from stages.synthesize.run import run

    with pytest.raises(ServiceError, match=r"no engine answers, and synthesize\.swe\.when_no_engine is fail"):
        run(strictly(), no_set)
    assert not list(no_set.iterdir())


class Unbuildable:
    """Tools whose engine answers and can make no image."""

    def __init__(self) -> None:
        self.tries = 0

    def sandboxes(self) -> Unbuildable:
        return self

    def build(self, name: str, requirements: Sequence[str]) -> str:
        self.tries += 1
        raise ServiceError(f"pip could not get {requirements[0]}", "Look at pip's configuration.")

    def open(self, image: str, **settings: Any) -> Sandbox:
        raise AssertionError("there is no image")


def test_what_keeps_the_set_from_being_made_is_said_once(
    no_set: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from stages.synthesize.run import run

    found = Unbuildable()
    monkeypatch.setattr(tools, "missing", lambda need: None)
    monkeypatch.setattr(tools, "Tools", lambda: found)
    settings = profiles.load("smoke", overrides={**SMOKE, "synthesize.swe.packages": ["inflection"]})
    summary = run(settings, no_set)
    told = "swe: skipped: pip could not get pytest==9.2.0. Look at pip's configuration."
    assert summary["left_out"] == summary["notes"] == [told] and "swe" not in summary
    assert found.tries == 1 and capfd.readouterr().out.count(told) == 1, "not tried again for the other split"
    assert sorted(file.name for file in no_set.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    with pytest.raises(ServiceError, match="pip could not get"):
        run(strictly({**SMOKE, "synthesize.swe": {**MADE, "packages": ["inflection"]}}), no_set)


def test_an_image_that_cannot_be_made_is_no_reason_to_fail(
    image: str, no_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.synthesize.run import run

    spec = (paths.DATA_SPECS / "swe.yaml").read_text()
    assert "pytest==9.2.0" in spec
    (tmp_path / "swe.yaml").write_text(spec.replace("pytest==9.2.0", "pytest==0.0.1"))
    monkeypatch.setattr(paths, "DATA_SPECS", tmp_path)
    made = {**SMOKE, "synthesize.swe": {**MADE, "packages": ["inflection"]}}
    summary = run(profiles.load("smoke", overrides=made), no_set)
    assert "swe" not in summary and summary["left_out"] == summary["notes"] and not (no_set / "swe").exists()
    (told,) = summary["notes"]
    assert re.fullmatch(r"swe: skipped: pip could not get .*pytest==0.0.1.*", told)
    with pytest.raises(ServiceError, match="pip could not get"):
        run(strictly(made), no_set)


def test_without_an_engine_rl_and_evaluate_go_on_and_say_so(no_engine: None, world: Path) -> None:
    from stages.evaluate.run import run as evaluate
    from stages.rl.train import run as train

    told = "swe: skipped: no engine; infra/sandbox/engine.sh starts one"
    short = {**ALONE, "rl-40k.train_steps": 1}
    result = train(StageContext(request(world, "rl-40k", "without", ("swe",), **short)))
    assert told in result.notes and result.left_out == (told,)
    assert not any(name.startswith("swe/") for name in result.metrics)
    lines = [json.loads(line) for line in read_lines(world / "without" / "rollouts" / "step_00001.jsonl")]
    assert {line["family"] for line in lines} == {"logic"} and len(lines) == 4 * 4, "the others have its share"
    result = evaluate(StageContext(request(world, "evaluate", "evaluated-without", ("swe",), "without", **short)))
    assert told in result.notes and result.left_out == (told,)
    assert not any(name.startswith("swe") for name in result.metrics)
    assert not (world / "evaluated-without" / "swe.json").exists()
    assert [Path(figure).name for figure in result.figures] == ["pass_at_1.png"]


def test_what_was_left_out_stands_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from m1.cli.display import Display

    ended = StageRow("synthesize", "ran", "", seconds=1.25, left_out=(LEFT_OUT,))
    Display().show([Event("stage ended", "synthesize", row=ended)])
    assert capsys.readouterr().out.endswith(f"synthesize         1.2 s  {LEFT_OUT}\n")


# --- opening what judges ---

DEMANDS = {"swe": Demand(Need.SANDBOX)}


class NoTools:
    """Nothing may be asked for here."""

    def sandboxes(self) -> DockerSandboxes:
        raise AssertionError("a family that is left out needs nothing")


def test_a_set_without_tasks_of_the_split_is_said_too(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from m1.tokenizer import load_tokenizer

    rows = [row for row in read_lines(world / "synthesize" / "heldout.jsonl") if json.loads(row)["family"] == "logic"]
    (tmp_path / "heldout.jsonl").write_text("".join(row + "\n" for row in rows))
    asked = request(world, "evaluate", "no-set", **ALONE)
    context = StageContext(asked.model_copy(update={"data": {**asked.data, "synthesize": str(tmp_path)}}))
    wanted = {name: part.prompts for name, part in context.section.asked().items()}
    tokenizer = load_tokenizer(world / "tokenizer")
    with opened(context, "heldout", tokenizer, wanted, DEMANDS, NoTools()) as found:
        told = (
            "swe: skipped: the set has no task of the heldout split: synthesize left them out, or synthesize.swe names "
            "no source for it"
        )
        assert list(found.pools) == ["logic"] and found.left_out == found.notes == (told,)
    assert f"evaluate: {told}" in capfd.readouterr().out


def test_prompts_of_a_family_are_its_own_and_the_long_ones_are_left_out(world: Path) -> None:
    from m1.tokenizer import load_tokenizer

    context = StageContext(request(world, "evaluate", "pools", ("swe",), **ALONE))
    tokenizer = load_tokenizer(world / "tokenizer")
    rows = [row for row in read_rows(world / "synthesize" / "train.jsonl") if row.family == "logic"]
    lengths = sorted(len(prompt.tokens) for prompt in tokenised(rows, tokenizer))
    limit = lengths[len(lengths) // 2]
    assert lengths[0] >= 8 and limit < lengths[-1]
    wanted = {"logic": FamilyPrompts(max_prompt_length=limit)}
    with opened(context, "train", tokenizer, wanted, {}, NoTools()) as found:
        pool = found.pools["logic"]
        assert found.notes == found.left_out == () and pool.ends == ()
        assert pool.prompts == tokenised(rows, tokenizer, limit), "in the order of the file"
        assert len(pool.prompts) < len(rows) and max(len(prompt.tokens) for prompt in pool.prompts) == limit
        kept = pool.limited(3)
        assert [sum(prompt.row.task == task for prompt in kept) for task in ("arithmetic", "dyck_language")] == [3, 3]
    wanted = {"logic": FamilyPrompts(max_prompt_length=8)}
    words = f"evaluate: none of the {len(rows)} prompts of family logic has at most max_prompt_length=8 tokens"
    with (
        pytest.raises(UsageError, match=words),
        opened(context, "train", tokenizer, wanted, {}, NoTools()),
    ):
        raise AssertionError("no prompt is left")


def test_judges_are_closed_whatever_happens(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sandboxes that only tell that they were opened and closed: one for each environment of the set."""
    import contextlib

    from m1.tokenizer import load_tokenizer
    from m1.training import parallel

    told: list[str] = []

    class Told:
        def sandboxes(self) -> Told:
            return self

        def build(self, name: str, requirements: Sequence[str]) -> str:
            told.append(f"build {name} {' '.join(requirements)}")
            return f"image-{name}"

        @contextlib.contextmanager
        def open(self, image: str, *, warm: int, limits: Any) -> Iterator[object]:
            told.append(f"open {image} {warm} {limits.seconds:g}")
            try:
                yield object()
            finally:
                told.append(f"close {image}")

    context = StageContext(request(world, "rl-40k", "opened", **ALONE))
    wanted = {name: part.prompts for name, part in context.section.asked().items()}
    parallel.initialize(context.profile.parallel, 1)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            opened(context, "train", load_tokenizer(world / "tokenizer"), wanted, DEMANDS, Told()) as found,  # type: ignore[arg-type]
        ):
            assert list(found.pools) == ["logic", "swe"] and found.pools["swe"].ends == ENDS
            assert found.notes == ("swe: 6 of 6 prompts have at most 340 tokens",) and found.left_out == ()
            ids = [prompt.row.id for prompt in found.pools["swe"].prompts]
            assert sorted(ids) != ids and len(set(ids)) == 6, "shuffled: the file has one source after the other"
            assert told == [f"build python {' '.join(images.DEFAULT_REQUIREMENTS)}", "open image-python 2 60"]
            raise KeyboardInterrupt
    finally:
        parallel.shutdown()
    assert told[2:] == ["close image-python"]
