"""The RL and evaluate stages end to end on a small untrained model, whose only reward is the length penalty."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from m1 import paths
from m1.config.tasks import TaskRange
from m1.errors import Checkpointed
from m1.files import write_rows
from m1.run import profiles
from m1.run.contract import StageContext, StageRequest, Upstream, checkpoint_of, load_result
from m1.run.folder import prepare, read_metrics
from m1.tasks.base import Row, Verdict

PARENT_STAGE = "context-extension"
OVERRIDES = {
    "checkpoints.stop_seconds": 600.0,
    "parallel.world_size": 1,
    "model.num_layers": 4,
    "model.softmax_every": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 1,
    "model.head_dim": 16,
    "model.num_experts": 3,
    "model.moe_ffn_hidden_size": 24,
    "model.vocab_size": 300,
    "evaluate.samples_per_prompt": 2,
    "evaluate.prompts_per_task": 2,
    "evaluate.max_new_tokens": 12,
    "evaluate.swe": None,
} | {
    f"rl-{name}.{field}": value
    for name in ("40k", "80k")
    for field, value in {
        "train_steps": 4,
        "prompts_per_step": 4,
        "group_size": 4,
        "updates_per_step": 2,
        "max_generation_rounds": 2,
        "micro_batch_size": 4,
        "max_prompt_length": 400,
        "rewards.overlong_cache": 11,
        "learning_rate.max": 3e-3,
        "optimizer.final_norm_lr_mult": 1.0,
        "checkpoint_every": 2,
        "evaluate_every": 2,
        "evaluate_prompts_per_task": 1,
    }.items()
}
OVERRIDES |= {"rl-40k.windows": [12], "rl-80k.windows": [12, 14, 16], "rl-80k.max_solve_rate": 0.9}
OVERRIDES |= {"rl-80k.train_steps": 5}  # enough for the last window, should every move be forced


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data and an untrained parent run, made by the project's own parts."""
    from m1.model.hybrid import build_model
    from m1.tasks.logic.draw import draw
    from m1.training import checkpoint, parallel
    from stages.tokenizer.train import save, train

    root = tmp_path_factory.mktemp("world")
    settings = profiles.load("tiny", overrides=OVERRIDES)
    tasks = {name: TaskRange(max_difficulty=1) for name in ("arithmetic", "word_sorting")}
    (root / "synthesize").mkdir()
    (root / "tokenizer").mkdir()
    taken: set[str] = set()
    rows = {}
    for split, count in (("heldout", 3), ("train", 20)):
        problems = draw(tasks, count, seed=1, purpose=split, taken=taken)
        rows[split] = [problem.row(with_response=False) for problem in problems]
        write_rows(root / "synthesize" / f"{split}.jsonl", [row.to_json() for row in rows[split]], sort_keys=True)
    texts = [Path(__file__).read_text(encoding="utf-8"), *(row.question for row in rows["train"])]
    save(train(texts, settings.model.vocab_size), root / "tokenizer")

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
        stage=PARENT_STAGE, profile=settings.to_dict(), fingerprint="a" * 64, output=str(parent), data={},
        data_digests={},
    )  # fmt: skip
    StageContext(made).finish(checkpoint=saved, key_metric="", before=None, after=None, metrics={})
    return root


def request(world, name, output, parent="parent", **changes):
    settings = profiles.load("tiny", overrides={**OVERRIDES, **changes})
    parent_run = world / parent
    earlier = load_result(parent_run)
    return StageRequest(
        stage=name, profile=settings.to_dict(), fingerprint="b" * 64, output=str(world / output),
        data={"synthesize": str(world / "synthesize"), "tokenizer": str(world / "tokenizer")}, data_digests={},
        parent=str(parent_run), parent_stage=earlier.stage,
        history=(*earlier.request.history, Upstream(stage=earlier.stage, run=str(parent_run))),
    )  # fmt: skip


def steps_of(run):
    """Step metrics without those that measure time."""
    lines = [line for line in read_metrics(run) if "rl/reward" in line.metrics]
    return [{k: v for k, v in line.metrics.items() if not k.startswith("time/")} for line in lines]


def heldout_steps(run):
    return [line.step for line in read_metrics(run) if "heldout/pass@1/mean" in line.metrics]


def rollouts_of(run):
    """What was written down of the rollouts, by file."""
    return {file.name: file.read_text() for file in sorted((run / "rollouts").iterdir())}


def weights_of(run, settings):
    from m1.training import checkpoint, parallel

    parallel.initialize(settings.parallel, 1)
    model = checkpoint.load_model(checkpoint_of(run), settings.model, settings.parallel)
    weights = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    parallel.shutdown()
    return weights


@pytest.fixture(scope="module")
def finished(world):
    from stages.rl.train import run

    run(StageContext(request(world, "rl-40k", "whole")))
    return world / "whole"


def test_a_run_leaves_everything_it_promises(finished):
    result = load_result(finished)
    assert result.stage == "rl-40k" and result.key_metric == "held-out pass@1"
    assert (finished / result.checkpoint / "manifest.json").is_file()
    assert all((finished / figure).stat().st_size > 1000 for figure in result.figures) and len(result.figures) == 8
    steps = steps_of(finished)
    assert len(steps) == 4
    for metrics in steps:
        assert metrics["agreement/pearson"] > 0.999 and metrics["agreement/max_abs_difference"] < 1e-4
        assert metrics["rl/updates"] == 2 and metrics["rl/grad_norm"] > 0
        assert 0 <= metrics["cispo/clip_frac_high"] <= 1 and metrics["cispo/is_weight_max"] > 1
    assert heldout_steps(finished) == [0, 2, 4]
    written = {name: [json.loads(line) for line in text.splitlines()] for name, text in rollouts_of(finished).items()}
    assert list(written) == ["step_00001.jsonl", "step_00002.jsonl", "step_00004.jsonl"]
    for step, lines in zip((1, 2, 4), written.values(), strict=True):
        assert len(lines) % 4 == 0 and {"prompt", "response", "reward", "advantage", "finish_reason"} <= set(lines[0])
        assert {line["family"] for line in lines} == {"logic"}
        assert {line["weight_version"] for line in lines} == {step - 1}, "the number of batches trained on before"


def test_it_learns_what_is_rewarded(finished):
    """Here only shortness pays."""
    steps = steps_of(finished)
    assert steps[-1]["rl/reward"] > steps[0]["rl/reward"] + 0.1
    assert steps[-1]["rl/response_length"] < steps[0]["rl/response_length"] - 1


def test_killed_and_continued_is_bit_for_bit_the_whole_run(world, finished):
    from m1.training import parallel
    from stages.rl.train import run

    class Killed(StageContext):
        def log_metrics(self, step, metrics):
            if step == 3:
                raise KeyboardInterrupt
            super().log_metrics(step, metrics)

    again = request(world, "rl-40k", "killed")
    with pytest.raises(KeyboardInterrupt):
        run(Killed(again))
    parallel.shutdown()
    assert load_result(world / "killed") is None
    run(StageContext(again))
    assert steps_of(world / "killed") == steps_of(finished)
    assert rollouts_of(world / "killed") == rollouts_of(finished)
    settings = again.load_profile()
    one, two = weights_of(finished, settings), weights_of(world / "killed", settings)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert load_result(world / "killed").before == load_result(finished).before


@pytest.mark.parametrize("call", [5, 30, 60, 70])
def test_sigterm_abandons_rollouts_and_going_on_is_bit_for_bit_the_whole_run(world, finished, monkeypatch, call):
    """The signal arrives while tokens are generated, first for an evaluation; saved is the state before that step."""
    from m1.rollout.decoder import Decoder
    from m1.training import parallel
    from stages.rl.train import run

    again, calls, step = request(world, "rl-40k", f"stopped_{call}"), [0], Decoder.step

    def counted(self, cache, tokens):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a token takes longer at a size where it matters
        return step(self, cache, tokens)

    monkeypatch.setattr(Decoder, "step", counted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Checkpointed):
        run(StageContext(again))
    signal.signal(signal.SIGTERM, before)
    parallel.shutdown()
    assert calls[0] == call, "not one token more"
    run(StageContext(again))
    assert steps_of(world / f"stopped_{call}") == steps_of(finished)
    assert rollouts_of(world / f"stopped_{call}") == rollouts_of(finished)
    assert heldout_steps(world / f"stopped_{call}") == [0, 2, 4]
    assert load_result(world / f"stopped_{call}").before == load_result(finished).before


def test_two_ranks_generate_and_train_on_the_same_as_one(world, finished):
    """Through torchrun: rollouts of the first step are identical, the update equal up to float rounding."""
    two = request(world, "rl-40k", "two", **{"parallel.world_size": 2, "rl-40k.train_steps": 1})
    file = prepare(two.run, two)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "stages.rl", "--request", str(file)],
        check=True, cwd=paths.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    (theirs,), ours = steps_of(world / "two"), steps_of(finished)[0]
    same = [name for name in ours if name.startswith("rl/") and "grad" not in name and name != "rl/loss"]
    assert {name: theirs[name] for name in same} == pytest.approx({name: ours[name] for name in same}, rel=1e-6)
    assert theirs["rl/grad_norm"] == pytest.approx(ours["rl/grad_norm"], rel=1e-3)
    assert theirs["rl/loss"] == pytest.approx(ours["rl/loss"], rel=1e-3, abs=1e-5)


def test_the_second_stage_widens_its_windows_and_drops_easy_prompts(world):
    from stages.rl.train import run

    run(StageContext(request(world, "rl-80k", "second")))
    second = world / "second"
    windows = [metrics["rl/window"] for metrics in steps_of(second)]
    assert windows[0] == 12 and windows == sorted(windows) and windows[-1] > 12
    rates = json.loads((second / "solve_rate.json").read_text())
    assert rates and all(0 <= rate <= 1 for rate in rates.values())
    notes = load_result(second).notes
    assert "prompts dropped" in notes[0] and "window 12 -> 14" in notes[1]


def test_evaluate_compares_the_checkpoints(world, finished):
    from stages.evaluate.run import checkpoints_to_evaluate, run

    result = run(StageContext(request(world, "evaluate", "evaluated", parent="whole")))
    assert result.checkpoint is None
    table = json.loads((world / "evaluated" / "pass_at_1.json").read_text())
    assert list(table) == [PARENT_STAGE, "rl-40k"]
    for row in table.values():
        assert set(row) == {"arithmetic", "word_sorting", "mean"}
        assert all(0 <= entry["interval_95"][0] <= entry["pass@1"] <= entry["interval_95"][1] for entry in row.values())
    assert result.metrics["pass@1/rl-40k/mean"] == table["rl-40k"]["mean"]["pass@1"]
    samples = (world / "evaluated" / "samples" / "rl-40k.jsonl").read_text().splitlines()
    assert len(samples) == 4 and len(json.loads(samples[0])["responses"]) == 2

    names = ("pretrain", "context-extension", "sft", "rl-40k")
    history = [Upstream(stage=name, run="folder") for name in names]
    assert [run.stage for run in checkpoints_to_evaluate(history)] == ["context-extension", "sft", "rl-40k"]


def test_heldout_prompts_are_answered_as_in_the_reports_evaluation(world):
    """Temperature 1 and top-p 0.95 (MiniMax-M1 report §6), in the longest window, and only the plain family's."""
    from m1.rollout.engine import Rollout, Sampling
    from m1.tokenizer import load_tokenizer
    from m1.training import parallel
    from stages.rl.heldout import HeldOut
    from stages.rl.state import State

    asked = []

    class Engine:
        weight_version = 0

        def generate(self, prompts, seeds, sampling, stop=None):
            asked.append((prompts, seeds, sampling))
            return [[Rollout([5], [-0.1], "stop") for _ in group] for group in seeds]

    class Never:
        def noticed(self):
            return False

        def agreed(self):
            return False

    context = StageContext(request(world, "rl-80k", "measured"))
    parallel.initialize(context.profile.parallel, 1)
    heldout = HeldOut(context, Engine(), load_tokenizer(context.data["tokenizer"]), Never())
    state = State()
    for state.step in (0, 0, 1, 2):
        heldout.measure_if_due(state)
    parallel.shutdown()
    assert [step for step, _ in state.heldout] == [0, 2] and len(asked) == 2, "once for each step that is due"
    for prompts, seeds, sampling in asked:
        assert len(prompts) == 2 and [len(group) for group in seeds] == [4, 4], "one of either task, four responses"
        assert sampling == Sampling(16, temperature=1.0, top_p=0.95, repetition=None)
    assert asked[0][1] == asked[1][1], "measured on the same draws"


def test_accuracy_is_the_mean_over_tasks_with_the_error_of_the_prompts():
    from m1.tasks.pass_rate import Answered, accuracy_by_task

    def answered(task, correct):
        row = Row("", "logic", task, 1, "", "", "", {})
        return Answered(row, [], [], [Verdict(float(each), each, True) for each in correct])

    rates = {"b": [[True, False], [True, True]], "a": [[False, False], [True, False]]}
    table = accuracy_by_task([answered(task, correct) for task, all_of_it in rates.items() for correct in all_of_it])
    assert list(table) == ["a", "b", "mean"]
    assert [entry.value for entry in table.values()] == [0.25, 0.75, 0.5]
    # two prompts with rates r and r + 1/2: sample deviation sqrt(1/8), error sqrt(1/16)
    assert table["a"].standard_error == pytest.approx(0.25)
    assert table["mean"].standard_error == pytest.approx((2 * 0.25**2) ** 0.5 / 2)
