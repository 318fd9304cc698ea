"""The checkpoints of a stage run, in one process: retention, going on, damage, SIGTERM."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1.config.training import LearningRate
from m1.errors import Checkpointed, Interrupted, UsageError
from m1.run import folder as folders
from m1.run import profiles as profile
from m1.run.contract import StageContext, StageRequest
from m1.run.resolve import resumed
from m1.training import checkpoint
from m1.training.saving import surplus

STEPS = 9


@pytest.fixture(autouse=True)
def keep_handler():
    """Stopping changes what SIGTERM does to this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(make_trainer, micro_batches, tmp_path):
    """Trains like a stage: (name of the run folder, what happens in a step, settings) -> final checkpoint."""
    from m1.training import loop

    def run(name: str, during=lambda step: None, resume: str | None = None, **settings) -> Path:
        # On a busy machine the deadline must not end this process.
        overrides = {f"checkpoints.{key}": value for key, value in {"stop_seconds": 600.0, **settings}.items()}
        values = profile.load("smoke", overrides={"parallel.world_size": 1, **overrides}).to_dict()
        output = str(tmp_path / name)
        context = StageContext(
            StageRequest(
                stage="pretrain", profile=values, fingerprint="f" * 64, output=output, data={}, data_digests={},
                resume=resume,
            )
        )  # fmt: skip

        def batches(step: int):
            during(step)
            return micro_batches(step)

        final, _, _ = loop.train(
            context, make_trainer(), steps=STEPS, learning_rate=LearningRate(max=1e-3, warmup_fraction=0.5),
            batches=batches, held_out=lambda: {"loss": 1.0}, evaluate_every=100, checkpoint_every=2, log_every=1,
        )  # fmt: skip
        return final

    return run


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [line for line in folders.read_metrics(run) if "train/loss" in line.metrics]
    return [(line.step, line.metrics["train/loss"], line.metrics["train/grad_norm"]) for line in lines]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def sigterm_at(*steps: int):
    def during(step: int) -> None:
        if step in steps:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a step lasts longer than it takes to notice the signal

    return during


def killed_at(step_of_death: int):
    def during(step: int) -> None:
        if step == step_of_death:
            raise KeyboardInterrupt

    return during


@pytest.mark.parametrize("beside", [True, False])
def test_sigterm_saves_and_going_on_equals_never_having_stopped(run, tmp_path, beside) -> None:
    run("whole", asynchronous=beside)
    for stopped_at in (3, 4):  # 4 is the step after which a checkpoint is due anyway... and 5 when it is being written
        with pytest.raises(
            Checkpointed, match=rf"pretrain was stopped by SIGTERM .* after step {stopped_at + 1} "
        ) as e:
            run("stopped", sigterm_at(stopped_at), asynchronous=beside)
        assert e.value.exit_code == 85
        left = json.loads((tmp_path / "stopped" / folders.INTERRUPTION).read_text())
        assert left["step"] == stopped_at + 1
        assert checkpoint.damage(tmp_path / "stopped" / left["checkpoint"]) is None
    final = run("stopped", asynchronous=beside)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == STEPS
    assert names(tmp_path / "stopped") == names(tmp_path / "whole") == [final.name]


def test_sigterm_means_what_it_meant_once_the_stage_is_done(run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run("whole")
    assert signal.getsignal(signal.SIGTERM) is before


def test_retention(run, tmp_path) -> None:
    seen = {}

    def look(step: int) -> None:
        seen[step] = [n for n in names(tmp_path / "kept") if n.startswith("step_")] if step else []

    run("kept", look, keep=2, keep_every=4, asynchronous=False)
    assert seen[8] == ["step_00000004", "step_00000006", "step_00000008"]
    assert names(tmp_path / "kept") == ["step_00000004", "step_00000008", "step_00000009"]
    run("last", look, keep=3)
    assert names(tmp_path / "last") == ["step_00000009"]


@pytest.mark.parametrize(
    ("keep", "every", "gone"), [(1, None, [2, 4, 6]), (2, None, [2, 4]), (9, None, []), (1, 4, [2, 6]), (2, 6, [2, 4])]
)
def test_what_is_surplus(keep, every, gone) -> None:
    assert surplus([8, 2, 6, 4], keep, every) == gone


def test_a_killed_run_goes_on_from_the_last_complete_one_and_cleans_up(run, tmp_path) -> None:
    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", killed_at(7), asynchronous=False)
    (tmp_path / "killed" / "checkpoints" / ".step_00000008.unfinished").mkdir()
    run("killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert names(tmp_path / "killed") == ["step_00000009"]


def test_a_damaged_one_is_named_and_the_one_before_it_used(run, tmp_path, caplog, capsys) -> None:
    """With keep=1 after the damage, the good one must outlive the damaged one that has a higher number."""
    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("damaged", killed_at(7), asynchronous=False)
    folder = tmp_path / "damaged" / "checkpoints"
    (folder / "step_00000006" / "__0_0.distcp").unlink()
    with pytest.raises(Checkpointed):
        run("damaged", sigterm_at(4), keep=1)
    assert "step_00000006 is damaged (__0_0.distcp is missing) and skipped" in caplog.text
    assert f"pretrain continues after step 4 from {folder / 'step_00000004'}" in capsys.readouterr().out
    assert names(tmp_path / "damaged") == ["step_00000005"], "replaced by the newer complete one"
    run("damaged")
    assert losses(tmp_path / "damaged") == losses(tmp_path / "whole")


def test_with_none_left_it_says_that_it_starts_from_the_beginning(run, tmp_path, caplog) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("lost", killed_at(5), asynchronous=False)
    for folder in checkpoint.step_folders(tmp_path / "lost" / "checkpoints"):
        (folder / checkpoint.MANIFEST).unlink()
    started = []
    with caplog.at_level(logging.WARNING):
        run("lost", started.append)
    assert started == list(range(STEPS))
    assert "pretrain: no undamaged checkpoint is left, it starts from the beginning" in caplog.text
    assert names(tmp_path / "lost") == ["step_00000009"]


def test_another_runs_checkpoints_are_continued_until_there_are_own_ones(run, tmp_path) -> None:
    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("first", killed_at(5), asynchronous=False)
    started = []
    with pytest.raises(Checkpointed):
        run("second", lambda step: [started.append(step), sigterm_at(5)(step)], resume=str(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    run("second", started.append, resume=str(tmp_path / "first"))
    assert started == [4, 5, 6, 7, 8]
    assert losses(tmp_path / "second") == losses(tmp_path / "whole")[4:]
    with pytest.raises(UsageError, match="holds no undamaged checkpoint"):
        run("third", resume=str(tmp_path / "first"))


def request_of(tmp_path: Path, name: str, **overrides) -> StageRequest:
    values = profile.load("smoke", overrides=overrides).to_dict()
    return StageRequest(
        stage="pretrain", profile=values, fingerprint="f" * 64, output=str(tmp_path / name), data={},
        data_digests={"tokens": "1"},
    )  # fmt: skip


def test_only_the_layout_of_a_continued_run_may_differ(tmp_path) -> None:
    first = request_of(tmp_path, "first")
    folders.prepare(first.run, first)
    two = request_of(tmp_path, "second", **{"parallel.world_size": 1, "checkpoints.keep": 3})
    assert resumed(two, tmp_path / "first").resume == str(tmp_path / "first")
    other = request_of(tmp_path, "second", **{"model.moe_ffn_hidden_size": 64, "seed": 8, "pretrain.train_steps": 9})
    with pytest.raises(UsageError, match="differs from this run in pretrain, seed, model; only the parallel layout"):
        resumed(other, tmp_path / "first")
    with pytest.raises(UsageError, match="is not a run folder"):
        resumed(two, tmp_path / "nothing")


def test_the_command_line_ends_with_the_stages_own_code(tmp_path) -> None:
    """What `m1 run` knows of a stage is the flow's events and the run folder; an older interruption is not news."""
    from infra.flow_runs import Event
    from m1.cli.run import Watched

    request = request_of(tmp_path, "run")
    folders.prepare(request.run, request)
    events = [Event("planned"), Event("stage running", stage="pretrain", output=request.output)]
    watched = Watched("id", tmp_path, time.time(), events=events)
    assert watched.interruption() is None
    folder = checkpoint.step_folder(Path(request.output) / "checkpoints", 7)
    StageContext(request).write_interruption(7, folder)
    error = watched.interruption()
    assert error is not None and error.exit_code == 85
    assert f"stage pretrain was stopped by SIGTERM and has saved its state after step 7 in {folder}" in str(error)
    assert Watched("id", tmp_path, time.time() + 1, events=events).interruption() is None
    folders.prepare(request.run, request)
    assert watched.interruption() is None, "the stage has been started again"


def test_a_step_longer_than_the_deadline_ends_without_a_checkpoint() -> None:
    """The main thread never gets to Python again; the deadline must hold all the same."""
    script = (
        "import os, time, ctypes\n"
        "from m1.training.stopping import StopRequest\n"
        "stop = StopRequest(1.0, 'pretrain')\n"
        "print('ready', flush=True)\n"
        "ctypes.CDLL(None).sleep(60)\n"  # in C; only a signal ends it early
        "ctypes.CDLL(None).sleep(60)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == Interrupted.exit_code == 75
    assert errors == (
        "error: pretrain was stopped by SIGTERM and had no new checkpoint complete within 1 s. "
        "Rerun it: it continues from the last complete one, if there is any.\n"
    )
