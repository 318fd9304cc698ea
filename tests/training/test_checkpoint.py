"""Checkpoints: complete or not there, whole in what they hold; damaged or partial ones are named and skipped."""

from __future__ import annotations

import json
import logging
import random
import resource
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from m1.errors import M1Error, UsageError
from m1.training import checkpoint


def steps(trainer, micro_batches, numbers: range) -> list[tuple[float, float]]:
    from m1.training.trainer import language_model_loss

    measured = [trainer.step(micro_batches(n), language_model_loss, 1e-3) for n in numbers]
    return [(m["loss"], m["grad_norm"]) for m in measured]


def drawn() -> list[float]:
    """The next number of every generator that a training process has."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    numbers = [random.random(), float(numpy.random.normal()), float(torch.rand(()))]
    with get_cuda_rng_tracker().fork():
        numbers.append(float(torch.rand(())))
    return numbers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_going_on_equals_never_having_stopped_bit_for_bit(make_trainer, micro_batches, tmp_path, precision) -> None:
    """With bf16 weights the float32 copies that the optimizer steps on are part of it."""
    trainer = make_trainer(precision=precision, rotary_base=12_345.0)
    steps(trainer, micro_batches, range(3))
    drawn()
    folder = trainer.save(checkpoint.step_folder(tmp_path, 3), {"step": 3, "cursor": 17})
    expected, numbers = steps(trainer, micro_batches, range(3, 8)), drawn()
    again = make_trainer(precision=precision)
    state = again.load(folder)
    assert (state["step"], state["cursor"]) == (3, 17)
    assert again.model.rotary_base == 12_345.0
    assert steps(again, micro_batches, range(3, 8)) == expected
    assert drawn() == numbers


def test_what_is_written_beside_the_training_is_the_state_it_was_asked_for(
    make_trainer, micro_batches, tmp_path
) -> None:
    trainer, writer = make_trainer(), checkpoint.Writer()
    steps(trainer, micro_batches, range(3))
    folder = checkpoint.step_folder(tmp_path, 3)
    state = {"step": 3, "rotary_base": 1e4, "list": [1]}
    writer.begin(folder, trainer.model, trainer.optimizer, state)
    state["list"].append(2)
    assert not folder.exists()
    expected = steps(trainer, micro_batches, range(3, 8))  # changes every weight while the files are written
    assert writer.wait() == folder and writer.folder is None and writer.poll() is None
    again = make_trainer()
    assert again.load(folder)["list"] == [1]
    assert steps(again, micro_batches, range(3, 8)) == expected


def test_a_new_stage_takes_the_weights_and_a_fresh_optimizer(make_trainer, micro_batches, tmp_path) -> None:
    trainer = make_trainer()
    steps(trainer, micro_batches, range(3))
    folder = trainer.save(checkpoint.step_folder(tmp_path, 3), {"step": 3})
    fresh = make_trainer()
    fresh.load(folder, optimizer=False)
    for ours, theirs in zip(fresh.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert steps(fresh, micro_batches, range(3, 4))[0][0] == steps(trainer, micro_batches, range(3, 4))[0][0]


def _flip(folder: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _truncate(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


#: How a checkpoint can be damaged, and a word of the line that says so.
DAMAGE = {
    "a flipped bit": (_flip, "SHA-256 of __0_"),
    "a truncated shard": (_truncate, "bytes in place of"),
    "a deleted shard": (lambda folder: next(folder.glob("*.distcp")).unlink(), "distcp is missing"),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "another state": (lambda folder: (folder / "state.json").write_text("{}"), "state.json has 2 bytes"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"files": {"a'), "cannot be read"),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    "an empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "manifest.json is missing"),
}


def test_damaged_and_partial_checkpoints_are_named_and_skipped(make_trainer, tmp_path, caplog) -> None:
    trainer = make_trainer()
    good = trainer.save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    for step, (damage, _) in enumerate(DAMAGE.values(), 2):
        copied = checkpoint.step_folder(tmp_path, step)
        shutil.copytree(good, copied)
        assert checkpoint.damage(copied) is None
        damage(copied)
    (tmp_path / ".step_00000099.unfinished").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == good
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(DAMAGE)
    for step, (_, words) in enumerate(DAMAGE.values(), 2):
        line = next(line for line in lines if checkpoint.step_folder(tmp_path, step).name in line)
        assert words in line and "skipped" in line
    with pytest.raises(UsageError, match=r"step_00000002 is damaged: the SHA-256 .* rerun its stage with --force"):
        make_trainer().load(checkpoint.step_folder(tmp_path, 2))
    shutil.rmtree(good)
    assert checkpoint.newest(tmp_path) is None


def test_the_manifest_covers_every_file(make_trainer, tmp_path) -> None:
    folder = make_trainer().save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {checkpoint.MANIFEST}
    assert set(json.loads((folder / checkpoint.MANIFEST).read_text())["files"]) == files
    assert {"state.json", "common.pt", ".metadata", "random_00000.pt"} <= files
    assert json.loads((folder / "state.json").read_text())["layout"]["world_size"] == 1


def test_a_full_disk_is_an_error_and_leaves_nothing_that_looks_complete(make_trainer, micro_batches, tmp_path) -> None:
    """Files above a limit cannot be written: the shards, by the processes beside the training."""
    trainer = make_trainer()
    before = trainer.save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(M1Error, match=r"step_00000002 could not be written: .*Free disk space"):
            trainer.save(checkpoint.step_folder(tmp_path, 2), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not checkpoint.step_folder(tmp_path, 2).exists()
    assert checkpoint.newest(tmp_path) == before
    again = trainer.save(checkpoint.step_folder(tmp_path, 2), {"step": 2})  # once there is room
    assert checkpoint.newest(tmp_path) == again


def test_a_checkpoint_of_another_model_is_refused(make_trainer, tmp_path) -> None:
    from m1.config.parallel import Parallel
    from m1.model.hybrid import build_model

    trainer = make_trainer()
    folder = trainer.save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    wider = trainer.model.settings.model_copy(update={"moe_ffn_hidden_size": 32})
    with pytest.raises(UsageError, match="holds another model than the profile's: moe_ffn_hidden_size 24, not 32"):
        checkpoint.load(folder, build_model(wider, Parallel(), seed=1), None)


def test_the_model_of_a_checkpoint_alone(make_trainer, tmp_path) -> None:
    from m1.config.parallel import Parallel

    trainer = make_trainer(rotary_base=20_000.0)
    folder = trainer.save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    model = checkpoint.load_model(folder, trainer.model.settings, Parallel())
    assert model.rotary_base == 20_000.0 and not model.training
    for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
