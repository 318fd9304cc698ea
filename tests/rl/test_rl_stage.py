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

from m1 import paths, stage
from m1.config.tasks import TaskRange
from m1.errors import Checkpointed
from m1.run import profiles as profile

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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data and an untrained parent run, made by the project's own parts."""
    from m1.model.hybrid import build_model
    from m1.tasks.logic.draw import draw, row, write_rows
    from m1.training import checkpoint, parallel
    from stages.tokenizer.train import save, train

    root = tmp_path_factory.mktemp("world")
    settings = profile.load("tiny", overrides=OVERRIDES)
    tasks = {name: TaskRange(max_difficulty=1) for name in ("arithmetic", "word_sorting")}
    (root / "synthesize").mkdir()
    (root / "tokenizer").mkdir()
    taken: set[str] = set()
    rows = {}
    for split, count in (("heldout", 3), ("train", 20)):
        problems = draw(tasks, count, seed=1, purpose=split, taken=taken)
        rows[split] = [row(problem, with_response=False) for problem in problems]
        write_rows(root / "synthesize" / f"{split}.jsonl", rows[split])
    texts = [Path(__file__).read_text(), *(r["question"] for r in rows["train"])]
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
    request = stage.StageRequest(PARENT_STAGE, settings.to_dict(), "a" * 64, str(parent), {}, {})
    context = stage.StageContext(request)
    context.finish(checkpoint=saved, key_metric="", before=None, after=None, metrics={})
    return root


def request(world, name, output, parent="parent", **changes):
    settings = profile.load("tiny", overrides={**OVERRIDES, **changes})
    parent_run = world / parent
    earlier = stage.load_result(parent_run)
    return stage.StageRequest(
        name, settings.to_dict(), "b" * 64, str(world / output),
        {"synthesize": str(world / "synthesize"), "tokenizer": str(world / "tokenizer")}, {}, str(parent_run),
        earlier.stage, [*earlier.request["history"], [earlier.stage, str(parent_run)]],
    )  # fmt: skip


def steps_of(run):
    """Step metrics without those that measure time."""
    lines = [line for line in stage.read_metrics(run) if "rl/reward" in line["metrics"]]
    return [{k: v for k, v in line["metrics"].items() if not k.startswith("time/")} for line in lines]


def weights_of(run, settings):
    from m1.training import checkpoint, parallel

    parallel.initialize(settings.parallel, 1)
    model = checkpoint.load_model(stage.checkpoint_of(run), settings.model, settings.parallel)
    weights = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    parallel.shutdown()
    return weights


@pytest.fixture(scope="module")
def finished(world):
    from stages.rl.train import run

    run(stage.StageContext(request(world, "rl-40k", "whole")))
    return world / "whole"


def test_a_run_leaves_everything_it_promises(finished):
    result = stage.load_result(finished)
    assert result.stage == "rl-40k" and result.key_metric == "heldout pass@1"
    assert (finished / result.checkpoint / "manifest.json").is_file()
    assert all((finished / figure).stat().st_size > 1000 for figure in result.figures) and len(result.figures) == 8
    steps = steps_of(finished)
    assert len(steps) == 4
    for metrics in steps:
        assert metrics["agreement/pearson"] > 0.999 and metrics["agreement/max_abs_difference"] < 1e-4
        assert metrics["rl/updates"] == 2 and metrics["rl/grad_norm"] > 0
        assert 0 <= metrics["cispo/clip_frac_high"] <= 1 and metrics["cispo/is_weight_max"] > 1
    heldout = [line["step"] for line in stage.read_metrics(finished) if "heldout/pass@1/mean" in line["metrics"]]
    assert heldout == [0, 2, 4]
    lines = [json.loads(line) for line in (finished / "rollouts" / "step_00004.jsonl").read_text().splitlines()]
    assert len(lines) % 4 == 0 and {"prompt", "response", "reward", "advantage", "finish_reason"} <= set(lines[0])


def test_it_learns_what_is_rewarded(finished):
    """Here only shortness pays."""
    steps = steps_of(finished)
    assert steps[-1]["rl/reward"] > steps[0]["rl/reward"] + 0.1
    assert steps[-1]["rl/response_length"] < steps[0]["rl/response_length"] - 1


def test_killed_and_continued_is_bit_for_bit_the_whole_run(world, finished):
    from m1.training import parallel
    from stages.rl.train import run

    class Killed(stage.StageContext):
        def log_metrics(self, step, metrics):
            if step == 3:
                raise KeyboardInterrupt
            super().log_metrics(step, metrics)

    again = request(world, "rl-40k", "killed")
    with pytest.raises(KeyboardInterrupt):
        run(Killed(again))
    parallel.shutdown()
    assert stage.load_result(world / "killed") is None
    run(stage.StageContext(again))
    assert steps_of(world / "killed") == steps_of(finished)
    settings = again.load_profile()
    one, two = weights_of(finished, settings), weights_of(world / "killed", settings)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert stage.load_result(world / "killed").before == stage.load_result(finished).before


@pytest.mark.parametrize("call", [5, 30, 60])
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
        run(stage.StageContext(again))
    signal.signal(signal.SIGTERM, before)
    parallel.shutdown()
    assert calls[0] == call, "not one token more"
    run(stage.StageContext(again))
    assert steps_of(world / f"stopped_{call}") == steps_of(finished)
    heldout = [
        line for line in stage.read_metrics(world / f"stopped_{call}") if "heldout/pass@1/mean" in line["metrics"]
    ]
    assert [line["step"] for line in heldout] == [0, 2, 4]
    assert stage.load_result(world / f"stopped_{call}").before == stage.load_result(finished).before


def test_two_ranks_generate_and_train_on_the_same_as_one(world, finished):
    """Through torchrun: rollouts of the first step are identical, the update equal up to float rounding."""
    two = request(world, "rl-40k", "two", **{"parallel.world_size": 2, "rl-40k.train_steps": 1})
    file = stage.write_request(two)
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

    run(stage.StageContext(request(world, "rl-80k", "second")))
    second = world / "second"
    windows = [metrics["rl/window"] for metrics in steps_of(second)]
    assert windows[0] == 12 and windows == sorted(windows) and windows[-1] > 12
    rates = json.loads((second / "solve_rate.json").read_text())
    assert rates and all(0 <= rate <= 1 for rate in rates.values())
    notes = stage.load_result(second).notes
    assert "prompts dropped" in notes[0] and "window 12 -> 14" in notes[1]


def test_evaluate_compares_the_checkpoints(world, finished):
    from stages.evaluate.run import checkpoints_to_evaluate, run

    result = run(stage.StageContext(request(world, "evaluate", "evaluated", parent="whole")))
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
    history = [[name, "folder"] for name in names]
    assert [name for name, _ in checkpoints_to_evaluate(history)] == ["context-extension", "sft", "rl-40k"]


def test_accuracy_is_the_mean_over_tasks_with_the_error_of_the_prompts():
    from m1.tasks.pass_rate import Answered, accuracy_by_task

    def answered(task, correct):
        return Answered({"task": task}, [], [], correct)

    rates = {"b": [[True, False], [True, True]], "a": [[False, False], [True, False]]}
    table = accuracy_by_task([answered(task, correct) for task, all_of_it in rates.items() for correct in all_of_it])
    assert list(table) == ["a", "b", "mean"]
    assert [entry.value for entry in table.values()] == [0.25, 0.75, 0.5]
    # two prompts with rates r and r + 1/2: sample deviation sqrt(1/8), error sqrt(1/16)
    assert table["a"].standard_error == pytest.approx(0.25)
    assert table["mean"].standard_error == pytest.approx((2 * 0.25**2) ** 0.5 / 2)
