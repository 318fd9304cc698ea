"""The pretraining stage under torchrun and the launcher: killed, damaged, stopped by SIGTERM, and yet bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from infra import launch
from infra.launch import local
from m1 import paths
from m1.errors import Checkpointed, Interrupted
from m1.run import folder as folders
from m1.run import profiles as profile
from m1.run.contract import StageRequest, load_result
from m1.training import checkpoint

SETTINGS = {
    "model.num_layers": 2,
    "model.softmax_every": 2,
    "pretrain.train_steps": 200,  # so many that no signal comes after the end, however fast the machine
    "pretrain.evaluate_every": 100,
    "pretrain.checkpoint_every": 5,
    "checkpoints.stop_seconds": 300.0,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    import m1.model  # noqa: F401  (prepares Megatron-core for this machine)

    folder = tmp_path_factory.mktemp("tokens")
    for name, count in (("train", 200), ("heldout", 20)):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=numpy.uint16)
        for document in range(count):
            generator = torch.Generator().manual_seed(document)
            builder.add_document(torch.randint(0, 512, (100,), generator=generator), [100])
        builder.finalize(str(folder / f"{name}.idx"))
    return folder


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "STATE", tmp_path_factory.mktemp("state"))
        yield


def request_of(folder: Path, tokens: Path, **changes) -> StageRequest:
    values = profile.load("smoke", overrides={**SETTINGS, **changes}).to_dict()
    return StageRequest(
        stage="pretrain", profile=values, fingerprint="c" * 64, output=str(folder), data={"tokens": str(tokens)},
        data_digests={"tokens": "1"},
    )  # fmt: skip


def ranks() -> list[psutil.Process]:
    """The children of torchrun; their own children, which write checkpoints, look alike."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "torch.distributed.run" in process.cmdline() and "-I" not in process.cmdline():
                found += process.children()
        except psutil.Error:
            continue
    return found


def run(request: StageRequest, at: int | None = None, act=None) -> list[str]:
    """Run the stage; once step `at` is in its log, `act` on its ranks. Returns what it printed."""
    lines: list[str] = []
    done = False

    def on_tick() -> None:
        nonlocal done
        steps = [line.step for line in folders.read_metrics(Path(request.output))]
        if at is not None and not done and max(steps, default=0) >= at:
            done = True
            act(ranks())

    try:
        launch.run_stage(request, on_line=lines.append, on_tick=on_tick)
    finally:
        run.lines = lines  # type: ignore[attr-defined]
    return lines


def measured(folder: Path) -> dict[int, tuple[float, float]]:
    lines = [line for line in folders.read_metrics(folder) if "train/loss" in line.metrics]
    return {line.step: (line.metrics["train/loss"], line.metrics["train/grad_norm"]) for line in lines}


def newest_step(folder: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in checkpoint.step_folders(folder / "checkpoints"))


@pytest.fixture(scope="module")
def plain_sigterm():
    """A stage that another test ran here, to an error, may have left its handler, which the launcher respects."""
    descriptor, handler = signal.set_wakeup_fd(-1), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, handler)
    signal.set_wakeup_fd(descriptor)


@pytest.fixture(scope="module")
def interrupted(tokens, state, plain_sigterm, tmp_path_factory):
    """One run that never stopped, and one that was killed, damaged, and stopped twice on its way."""
    root = tmp_path_factory.mktemp("runs")
    story: dict[str, object] = {"whole": root / "whole", "stopped": root / "stopped"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_TICK_SECONDS", 0.1)
        run(request_of(root / "whole", tokens))
        request = request_of(root / "stopped", tokens)

        with pytest.raises(launch.StageKilled):
            run(request, 17, lambda ranks: ranks[-1].kill())
        story["killed"] = newest_step(root / "stopped")
        newest = checkpoint.step_folder(root / "stopped" / "checkpoints", newest_step(root / "stopped"))
        shard = next(newest.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])

        with pytest.raises(Checkpointed) as one_rank:
            run(request, 35, lambda ranks: ranks[0].terminate())
        story["one rank"], story["lines"] = one_rank.value, run.lines  # type: ignore[attr-defined]
        story["left"] = newest_step(root / "stopped")

        with pytest.raises(Checkpointed) as launcher:
            run(request, 45, lambda ranks: os.kill(os.getpid(), signal.SIGTERM))
        story["launcher"] = launcher.value
        story["finished"] = run(request)
    return story


def test_the_end_is_bit_for_bit_that_of_a_run_that_never_stopped(interrupted) -> None:
    whole, stopped = measured(interrupted["whole"]), measured(interrupted["stopped"])
    assert len(whole) == 200 and stopped == whole
    one, two = (load_result(interrupted[name]) for name in ("whole", "stopped"))
    assert one is not None and two is not None and (one.before, one.after) == (two.before, two.after)
    assert not (interrupted["stopped"] / folders.INTERRUPTION).exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(interrupted) -> None:
    killed = interrupted["killed"]
    said = [line for line in interrupted["lines"] if "is damaged" in line]
    assert len(said) == 1, "by one rank only"
    assert f"step_{killed:08d} is damaged" in said[0] and "skipped" in said[0]
    continued = next(line for line in interrupted["lines"] if "continues after step" in line)
    assert f"continues after step {killed - 5} from" in continued


@pytest.mark.parametrize("who", ["one rank", "launcher"])
def test_sigterm_ends_the_stage_with_its_own_error(interrupted, who: str) -> None:
    error = interrupted[who]
    assert error.exit_code == 85 != Interrupted.exit_code
    assert "stage pretrain was stopped by SIGTERM and has saved its state after step" in str(error)
    assert "\n" not in str(error)


def test_it_goes_on_from_the_checkpoint_that_sigterm_left(interrupted) -> None:
    assert f"after step {interrupted['left']} in" in str(interrupted["one rank"])
    step = str(interrupted["launcher"]).split("after step ")[1].split()[0]
    assert any(f"continues after step {step} from" in line for line in interrupted["finished"])


def test_alone_a_rank_ends_with_the_exit_code(tokens, tmp_path) -> None:
    """As a cluster's launcher sees it, without torchrun and without ours."""
    request = request_of(tmp_path / "run", tokens, **{"parallel.world_size": 1, "pretrain.train_steps": 100_000})
    path = folders.prepare(request.run, request)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.pretrain", "--request", str(path)], cwd=paths.ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not folders.read_metrics(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85
    last = errors.splitlines()[-1]
    assert last.startswith("error: stage pretrain was stopped by SIGTERM and has saved") and "Traceback" not in errors
    left = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert left is not None and left.name in last
