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
from stages.synthesize.swe import LEFT_OUT, make_swe, write_questions

from infra.sandbox import Sandbox, engine, images
from m1 import chat, paths, stage
from m1.config.rl import Rewards
from m1.errors import ServiceError, UsageError
from m1.rollout.engine import Rollout
from m1.run import profiles as profile
from m1.run.contract import StageContext, StageRequest
from m1.tasks.prompts import Prompt
from m1.tasks.swe import sources
from m1.tasks.swe.judge import NO_ANSWER, UNJUDGED, Answered, Judge, Verdict
from m1.tasks.swe.patches import make_blocks
from m1.tasks.swe.reward import LIMITS
from m1.tasks.swe.tasks import KINDS, TaskSet
from m1.training.stopping import StopRequested
from stages.evaluate import swe_report
from stages.rl.rewards import judge_verdict
from stages.rl.rollouts import reward_swe, swe_metrics
from stages.rl.sampling import Group, MixedSampler, PromptSampler, dynamic_sampling
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
        profile.load("smoke", overrides=changes)


def test_the_line_that_waits_in_tiny_is_right(tmp_path: Path) -> None:
    text = (paths.PROFILES / "tiny.yaml").read_text()
    assert text.count("  # swe: {") == 1 and profile.load("tiny").rl_40k.swe is None
    (tmp_path / "tiny.yaml").write_text(text.replace("  # swe: {", "  swe: {"))
    settings = profile.load(str(tmp_path / "tiny.yaml"))
    assert settings.rl_40k.swe is not None and settings.rl_40k.swe == settings.rl_80k.swe


@pytest.mark.parametrize("name", ["tiny", "single-gpu", "m1-456b"])
def test_there_is_something_to_train_on_and_something_held_out(name: str) -> None:
    settings = profile.load(name)
    assert settings.synthesize.swe and settings.evaluate.swe
    spec = sources.load(paths.DATA_SPECS / f"{settings.synthesize.swe.spec}.yaml")
    split = {origin.name: origin.split for origin in spec.origins}
    assert {split[source] for source in settings.synthesize.swe.packages or split} == {"train", "heldout"}


def test_engine_and_code_are_part_of_the_identity_only_where_asked_for() -> None:
    plain, asking = profile.load("smoke"), profile.load("smoke", overrides=SMOKE)
    assert "stages/swe" not in stage.code_of("rl-40k", plain) and "stages/swe" in stage.code_of("rl-40k", asking)
    assert "stages/swe" not in stage.code_of("rl-80k", asking), "its section does not ask"
    for entry in stage.code_of("rl-40k", asking):
        assert (paths.ROOT / entry).exists()
    prints = [stage.fingerprint("rl-40k", asking, {}, None, [], None, there) for there in (None, False, True)]
    assert len(set(prints)) == 3


def test_a_planned_stage_counts_its_long_prompts() -> None:
    from flows.plan import expected_tokens

    plain, asking = profile.load("smoke"), profile.load("smoke", overrides=SMOKE)
    responses = plain.rl_40k.train_steps * plain.rl_40k.prompts_per_step * plain.rl_40k.group_size
    more = expected_tokens(asking, "rl-40k")[0] - expected_tokens(plain, "rl-40k")[0]  # type: ignore[operator]
    assert more == responses * 0.5 * (340 - plain.rl_40k.max_prompt_length)
    one = profile.load("smoke", overrides={"evaluate.prompts_per_task": 1})
    more = expected_tokens(asking, "evaluate")[0] - expected_tokens(one, "evaluate")[0]  # type: ignore[operator]
    assert more == 5 * 3 * 2 * (340 + 12)


# --- which prompts ---


@pytest.mark.parametrize("share", [0.25, 0.1, 1 / 3, 1.0])
def test_every_batch_has_its_share_and_a_cursor_resumes(share: float) -> None:
    def pools() -> tuple[PromptSampler, PromptSampler]:
        made = [[Prompt({"id": f"{kind}{i}", "task": kind}, [1]) for i in range(7)] for kind in ("sum", "swe-repair")]
        return PromptSampler(made[0], "5"), PromptSampler(made[1], "5")

    sampler = MixedSampler(*pools(), share)
    batches = [sampler.take(12) for _ in range(20)]
    assert [position for batch in batches for position in sorted(p for p, _ in batch)] == list(range(240))
    for batch in batches:
        count = sum(prompt.swe for _, prompt in batch)
        assert abs(count - share * 12) < 1
        assert not any(prompt.swe for _, prompt in batch[: 12 - count]), "they come last"
        by_rank = [sum(prompt.swe for _, prompt in batch[rank::2]) for rank in (0, 1)]
        assert abs(by_rank[0] - by_rank[1]) <= 1
    assert MixedSampler(*pools(), share, cursor=12 * 13).take(12) == batches[13]
    swe = [prompt.row["id"] for batch in batches for _, prompt in sorted(batch, key=lambda p: p[0]) if prompt.swe]
    assert len(set(swe[:7])) == 7, "a pass over all of them before any comes again"


# --- rewards ---


@pytest.fixture(scope="module")
def image() -> str:
    if (missing := engine.missing()) is not None:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    built = images.build_environment("python", list(images.DEFAULT_REQUIREMENTS), images.build_base("host-python"))
    OTHERS.update(containers(built))
    return built


@pytest.fixture
def sandbox(image: str) -> Iterator[Sandbox]:
    with Sandbox(image, warm=2, limits=LIMITS) as opened:
        yield opened


@pytest.fixture
def broken(image: str) -> Iterator[Sandbox]:
    """A sandbox whose image has gone since it was opened: no container can be made any more."""
    engine.client().tag(image, "m1-swe-gone", "now")
    with Sandbox("m1-swe-gone:now", warm=0) as opened:
        engine.client().remove_image("m1-swe-gone:now")
        yield opened


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


def row(task: Any) -> dict[str, Any]:
    return {"id": task.id, "task": f"swe-{task.kind}", "state": {"task": task.id}}


def test_right_wrong_and_a_failed_sandbox_are_one_nothing_and_left_out(
    sandbox: Sandbox, broken: Sandbox, tmp_path: Path
) -> None:
    good = mini.task("double", "repair", "train")
    test = mini.task("shout", "write-test", "train")
    lost = mini.task("shout", "repair", "train", environment="gone")
    tasks = mini.write_set(tmp_path, [good, test, lost])
    judge = Judge(tasks, {"python": sandbox, "gone": broken}, workers=2)
    texts = {
        good.id: [right(good), wrong(good), "no answer block", right(good)],
        test.id: [wrong(test), right(test), wrong(test), wrong(test)],
        lost.id: [right(lost), wrong(lost), "no answer block", right(lost)],
    }
    groups = []
    for position, task in enumerate((good, test, lost)):
        rollouts = [Rollout([position, i], [-0.5, -0.5], "stop") for i in range(4)]
        groups.append(Group(position, Prompt(row(task), [1]), rollouts, list(texts[task.id]), []))
    weights = Rewards(correct=1.0, format=0.1, overlong_cache=4)

    def roll_out(chosen: Sequence[Any]) -> list[Group]:
        reward_swe(judge, groups, window=40, weights=weights)
        return groups

    settings = profile.load("smoke", overrides={**ALONE, "rl-40k.prompts_per_step": 3, "rl-40k.updates_per_step": 1})
    batch = dynamic_sampling(PromptSampler([g.prompt for g in groups], "1"), roll_out, settings.rl_40k)
    assert [reward.total for reward in groups[0].rewards] == pytest.approx([1.1, 0.1, 0.0, 1.1])
    assert [reward.end for reward in groups[0].rewards] == ["resolved", "unresolved", NO_ANSWER, "resolved"]
    assert [reward.total for reward in groups[1].rewards] == pytest.approx([0.1, 1.1, 0.1, 0.1])
    left = groups[2]
    assert [reward.end for reward in left.rewards] == [NO_ANSWER] and len(left.unjudged) == 3
    assert left.texts == ["no answer block"] and [r.tokens for r in left.rollouts] == [[2, 2]]
    assert left.advantages == [0.0] and batch.groups == groups[:2]
    metrics = swe_metrics(batch)
    assert (metrics["swe/responses"], metrics["swe/unjudged"]) == (12, 3)
    assert metrics["swe/resolved"] == pytest.approx(3 / 9) and metrics["swe/resolved/write-test"] == 0.25
    assert metrics["swe/end/resolved"] == 3 and metrics["swe/end/unresolved"] == 4 and metrics["swe/end/no-answer"] == 2
    assert sum(value for name, value in metrics.items() if name.startswith("swe/end/")) == 9

    from stages.rl.updates import plan_updates

    (batches,) = plan_updates(batch.generated, settings.rl_40k, seed="s", rank=0, ranks=1)
    assert sum(int(part.loss_mask.sum()) for part in batches) == 9 * 2, "what was left out is not trained on"


def test_a_dead_engine_is_never_a_wrong_answer(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = mini.task("double", "repair", "train")
    tasks = mini.write_set(tmp_path, [task])
    with Sandbox(image, warm=0) as opened:
        judge = Judge(tasks, {"python": opened}, workers=2)
        monkeypatch.setenv("DOCKER_HOST", NOWHERE)  # the threads that judge look for their engine now
        [verdict, other] = judge.judge([(row(task), right(task)), (row(task), wrong(task))])
        monkeypatch.undo()
        assert {verdict.end, other.end} == {UNJUDGED} and "no Docker engine answers" in verdict.message
        assert judge.judge([(row(task), right(task))])[0].resolved
    with pytest.raises(ValueError, match="not judged has no reward"):
        judge_verdict(verdict, 3, window=10, weights=Rewards(overlong_cache=4))


def test_judging_is_abandoned_when_the_stage_is_asked_to_stop(image: str, tmp_path: Path) -> None:
    task = mini.task("double", "repair", "train")
    tasks = mini.write_set(tmp_path, [task])
    endless = "mini.py\n<<<<<<< SEARCH\ndef double(x):\n=======\ndef double(x):\n    while True: pass\n>>>>>>> REPLACE"

    class Asked:
        """Stands for SIGTERM, which comes once the answer's tests run."""

        def noticed(self) -> bool:
            return bool(opened._pool._taken)

        def agreed(self) -> bool:
            return True

    with Sandbox(image, warm=1) as opened, pytest.raises(StopRequested):
        judge = Judge(tasks, {"python": opened}, workers=1)
        judge.judge([(row(task), chat.render_response("", endless))], Asked())  # type: ignore[arg-type]
    assert not left(image)


def test_a_closed_sandbox_ends_the_jobs_that_run(image: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from infra.sandbox import Job

    opened = Sandbox(image, warm=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(opened.run, Job({}, ["sleep", "100"]))
        while not opened._pool._taken:
            assert not running.done()
        opened.close()
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


def answers_to(judge: Judge, tasks: TaskSet, answer: Any) -> list[Answered]:
    pairs = [(row(task), answer(task)) for task in tasks.tasks]
    return [Answered(r, [text], [], [verdict]) for (r, text), verdict in zip(pairs, judge.judge(pairs))]


def test_right_answers_resolve_all_and_empty_ones_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    tasks = mini.write_set(tmp_path, [mini.task(name, kind, "heldout") for name in mini.FAULTS for kind in KINDS])
    judge = Judge(tasks, {"python": sandbox}, workers=2)
    gold = swe_report.resolved_by_kind(answers_to(judge, tasks, right))
    assert list(gold) == [*KINDS, "all"] and all(kind.rate == kind.value == 1.0 for kind in gold.values())
    assert [kind.tasks for kind in gold.values()] == [2, 2, 2, 6] and gold["all"].ends == {"resolved": 6}
    empty = swe_report.resolved_by_kind(answers_to(judge, tasks, lambda task: chat.render_response("", "")))
    assert all(kind.rate == 0.0 for kind in empty.values()) and empty["all"].ends == {"empty": 6}


def test_unjudged_answers_do_not_count() -> None:
    def answered(kind: str, *verdicts: Verdict) -> Answered:
        return Answered({"task": f"swe-{kind}"}, [], [], list(verdicts))

    good, bad, lost = Verdict("resolved", 1.0, True), Verdict("empty", 0.0, True), Verdict(UNJUDGED, float("nan"), True)
    items = [answered("repair", good, lost), answered("repair", good, bad), answered("localise", lost, lost)]
    table = swe_report.resolved_by_kind(items)
    assert (table["repair"].rate, table["repair"].tasks, table["repair"].unjudged) == (0.75, 2, 1)
    assert (table["localise"].rate, table["localise"].tasks, table["localise"].unjudged) == (None, 0, 2)
    assert (table["all"].rate, table["all"].ends) == (0.75, {"resolved": 2, "empty": 1})
    metrics = swe_report.metrics("sft", table)
    assert metrics == {"swe_resolved/sft/repair": 0.75, "swe_resolved/sft/all": 0.75, "swe_unjudged/sft": 3.0}
    assert "the sandbox failed on 3 answers" in swe_report.sentence("sft", table)
    assert items[0].correct == [True, None]


# --- the stages ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of profile `smoke` with a set, and an untrained parent run, made by the project's own parts."""
    from m1.model.hybrid import build_model
    from m1.tasks.logic.draw import draw, row, write_rows
    from m1.training import checkpoint, parallel
    from stages.tokenizer.train import save, train

    root = tmp_path_factory.mktemp("world")
    settings = profile.load("smoke", overrides={**SMOKE, "parallel.world_size": 1})
    (root / "synthesize").mkdir()
    (root / "tokenizer").mkdir()
    taken: set[str] = set()
    for split, count in (("heldout", 2), ("train", 16)):
        problems = draw(settings.synthesize.tasks, count, seed=1, purpose=split, taken=taken)
        write_rows(root / "synthesize" / f"{split}.jsonl", [row(p, with_response=False) for p in problems])
    texts = [Path(__file__).read_text(), *(p.read_text() for p in (root / "synthesize").glob("*.jsonl"))]
    tokenizer = train(texts, settings.model.vocab_size)
    save(tokenizer, root / "tokenizer")
    tasks = [mini.task(name, kind, split) for name in mini.FAULTS for kind in KINDS for split in ("train", "heldout")]
    made = mini.write_set(root / "synthesize" / "swe", tasks)
    from m1.tokenizer import load_tokenizer

    rows = write_questions(made, {"mini": mini.is_code}, load_tokenizer(root / "tokenizer"), 300, root / "synthesize")
    assert rows == {"train": 6, "heldout": 6}

    parallel.initialize(settings.parallel, 1)
    model = build_model(settings.model, settings.parallel, seed=3)
    with torch.no_grad():
        model.output_layer.weight[3] *= 6.0  # <end_of_sentence>, so that lengths differ
    parent = root / "parent"
    parent.mkdir()
    folder = checkpoint.step_folder(parent / "checkpoints", 1)
    saved = checkpoint.save(folder, model, None, {"step": 1, "rotary_base": settings.model.rotary_base})
    parallel.shutdown()
    context = StageContext(StageRequest("context-extension", settings.to_dict(), "a" * 64, str(parent), {}, {}))
    context.finish(checkpoint=saved, key_metric="", before=None, after=None, metrics={})
    return root


def request(
    world: Path, name: str, output: str, engine_there: bool, parent: str = "parent", **changes: Any
) -> StageRequest:
    settings = profile.load("smoke", overrides={**SMOKE, **changes})
    earlier = stage.load_result(world / parent)
    assert earlier is not None
    data = {part: str(world / part) for part in ("synthesize", "tokenizer")}
    history = [*earlier.request["history"], [earlier.stage, str(world / parent)]]
    return StageRequest(
        name, settings.to_dict(), "b" * 64, str(world / output), data, {}, str(world / parent), earlier.stage, history,
        engine=engine_there,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(image: str, world: Path) -> Path:
    """rl-40k, where right answers, wrong ones and ones without form stand in for the model's."""
    from stages.rl.train import run

    ask = Judge.judge

    def answered(self: Judge, asked: Sequence[tuple[Any, str]], stop: Any = None) -> list[Verdict]:
        given = [
            (row, (right, wrong, lambda _: "no form")[number % 3](self._by_id[row["state"]["task"]]))
            for number, (row, _) in enumerate(asked)
        ]
        return ask(self, given, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "judge", answered)
        run(StageContext(request(world, "rl-40k", "trained", True, **ALONE)))
    assert not left(image)
    return world / "trained"


def test_rl_trains_on_what_the_sandbox_says(trained: Path) -> None:
    result = stage.load_result(trained)
    assert result is not None and any(figure.endswith("swe_resolved.png") for figure in result.figures)
    assert "swe: 6 of 6 prompts have at most 340 tokens" in result.notes
    steps = [line["metrics"] for line in stage.read_metrics(trained) if "swe/responses" in line["metrics"]]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["swe/responses"] == 2 * 4 and metrics["swe/unjudged"] == 0
        # Of eight answers in turn three are right and three wrong; the model's own two have no form.
        assert metrics["swe/resolved"] == 3 / 8 and metrics["swe/end/resolved"] == 3
        assert metrics["swe/end/no-answer"] == 2
        assert metrics["rl/correct"] == 3 / 16 and metrics["rl/updates"] > 0
        assert metrics["agreement/pearson"] > 0.99, "long prompts are read alike by both engines"
    written = (trained / "rollouts" / "step_00001.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, written) if line["task"].startswith("swe-")]
    assert [line["end"] for line in lines].count("resolved") == 3
    for line in lines:
        assert line["correct"] == (line["end"] == "resolved")
    assert any(line["trained_on"] and line["advantage"] > 0 for line in lines if line["correct"])


def test_evaluate_reports_resolved_rates_apart(
    image: str, world: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.evaluate.run import run

    ask = Judge.judge

    def answered(self: Judge, asked: Sequence[tuple[Any, str]], stop: Any = None) -> list[Verdict]:
        tasks = [self._by_id[row["state"]["task"]] for row, _ in asked]
        assert {task.split for task in tasks} == {"heldout"}
        given = [(row, text if task.kind == "localise" else right(task)) for task, (row, text) in zip(tasks, asked)]
        return ask(self, given, stop)

    monkeypatch.setattr(Judge, "judge", answered)
    result = run(StageContext(request(world, "evaluate", "evaluated", True, parent="trained", **ALONE)))
    assert not left(image)
    for name in ("context-extension", "rl-40k"):
        assert result.metrics[f"swe_resolved/{name}/repair"] == 1.0 == result.metrics[f"swe_resolved/{name}/write-test"]
        assert result.metrics[f"swe_resolved/{name}/localise"] == 0.0 and result.metrics[f"swe_unjudged/{name}"] == 0
        tasks = [task for task in ("arithmetic", "dyck_language")]
        mean = sum(result.metrics[f"pass@1/{name}/{task}"] for task in tasks) / 2
        assert result.metrics[f"pass@1/{name}/mean"] == mean, "not mixed"
    table = json.loads((world / "evaluated" / "swe.json").read_text())["checkpoints"]["rl-40k"]
    assert table["all"]["tasks"] == 6 and table["all"]["ends"] == {"resolved": 4, "no-answer": 2}
    assert "figures/swe_resolved.png" in result.figures
    assert any(note.startswith("swe: rl-40k: resolved repair 1.000 of 2; localise 0.000 of 2") for note in result.notes)
    samples = (world / "evaluated" / "samples" / "swe-rl-40k.jsonl").read_text().splitlines()
    assert len(samples) == 6 and {"prompt", "responses"} <= set(json.loads(samples[0]))


def test_two_ranks_judge_side_by_side_and_leave_nothing_behind(image: str, world: Path) -> None:
    """The stage as the flow starts it: torchrun, two ranks, each with a sandbox of its own."""
    two = request(world, "rl-40k", "two", True, **{"rl-40k.train_steps": 1})
    launch(two)
    (metrics,) = [x["metrics"] for x in stage.read_metrics(world / "two") if "swe/responses" in x["metrics"]]
    assert metrics["swe/responses"] == 8 == metrics["swe/end/no-answer"] and metrics["rl/tokens"] > 0
    assert not left(image)


def launch(asked: StageRequest, **environment: str) -> str:
    file = stage.write_request(asked)
    ranks = str(asked.profile["parallel"]["world_size"])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
         "-m", stage.STAGE_INFO[asked.stage].module, "--request", str(file)],
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


def test_without_an_engine_the_set_is_left_out_in_so_many_words(
    no_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "STATE", tmp_path)
    settings = profile.load("smoke", overrides=SMOKE)
    assert settings.synthesize.swe is not None
    summary = make_swe(settings, settings.synthesize.swe, tmp_path)
    assert summary == {"left_out": [LEFT_OUT], "notes": [LEFT_OUT]} and not list(tmp_path.iterdir())
    assert "infra/sandbox/engine.sh" in capfd.readouterr().out
    strict = profile.load("smoke", overrides={**SMOKE, "synthesize.swe": {**MADE, "when_no_engine": "fail"}})
    assert strict.synthesize.swe is not None
    with pytest.raises(ServiceError, match=r"synthesize: no Docker engine answers .*when_no_engine is fail"):
        make_swe(strict, strict.synthesize.swe, tmp_path)


def test_an_image_that_cannot_be_made_is_no_reason_to_fail(
    image: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "data_dir", lambda profile, stage: world / stage)
    spec = (paths.DATA_SPECS / "swe.yaml").read_text()
    assert "pytest==9.2.0" in spec
    (tmp_path / "swe.yaml").write_text(spec.replace("pytest==9.2.0", "pytest==0.0.1"))
    monkeypatch.setattr(paths, "DATA_SPECS", tmp_path)
    monkeypatch.setattr(paths, "STATE", tmp_path / "state")
    made = {**SMOKE, "synthesize.swe": {**MADE, "packages": ["inflection"]}}
    settings = profile.load("smoke", overrides=made)
    assert settings.synthesize.swe is not None
    summary = make_swe(settings, settings.synthesize.swe, tmp_path / "output")
    assert "swe" not in summary and summary["left_out"] == summary["notes"] and not (tmp_path / "output").exists()
    assert re.fullmatch(r"swe: skipped: pip could not get .*pytest==0.0.1.*", summary["notes"][0])
    strict = profile.load("smoke", overrides={**made, "synthesize.swe.when_no_engine": "fail"})
    assert strict.synthesize.swe is not None
    with pytest.raises(ServiceError, match="pip could not get"):
        make_swe(strict, strict.synthesize.swe, tmp_path / "output")


def test_without_an_engine_rl_and_evaluate_go_on_and_say_so(no_engine: None, world: Path) -> None:
    from stages.evaluate.run import run as evaluate
    from stages.rl.train import run as train

    told = "swe: skipped: no engine; infra/sandbox/engine.sh starts one"
    short = {**ALONE, "rl-40k.train_steps": 1}
    result = train(StageContext(request(world, "rl-40k", "without", False, **short)))
    assert told in result.notes and result.left_out == [told]
    assert not any(name.startswith("swe/") for name in result.metrics)
    result = evaluate(StageContext(request(world, "evaluate", "evaluated-without", False, parent="without", **short)))
    assert told in result.notes and result.left_out == [told]
    assert not any(name.startswith("swe") for name in result.metrics)
    assert json.loads((world / "evaluated-without" / "swe.json").read_text()) == {"notes": [told], "checkpoints": {}}


def test_what_was_left_out_stands_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from m1.cli.display import Display

    ended = {"event": "stage ended", "time": 0.0, "stage": "synthesize", "status": "ran", "seconds": 1.25}
    Display().show([{**ended, "left_out": [LEFT_OUT]}])
    assert capsys.readouterr().out.endswith(f"synthesize         1.2 s  {LEFT_OUT}\n")


def test_an_engine_without_a_set_is_said_too(image: str, world: Path, tmp_path: Path) -> None:
    from m1.tasks.swe.judge import opened

    asked = request(world, "evaluate", "no-set", True, **ALONE)
    asked.data["synthesize"] = str(tmp_path)
    with opened(StageContext(asked), "heldout", None) as (swe, said):  # type: ignore[arg-type]
        assert swe is None and said == [
            "swe: skipped: synthesize left the tasks out, as it had no engine; run it again"
        ]
