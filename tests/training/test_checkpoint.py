"""Checkpoints: going on equals never having stopped; damaged or partial ones are named and skipped."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from m1.errors import UsageError
from m1.training import checkpoint


def steps(trainer, micro_batches, numbers: range) -> list[tuple[float, float]]:
    from m1.training.trainer import language_model_loss

    measured = [trainer.step(micro_batches(n), language_model_loss, 1e-3) for n in numbers]
    return [(m["loss"], m["grad_norm"]) for m in measured]


def test_going_on_equals_never_having_stopped_bit_for_bit(make_trainer, micro_batches, tmp_path) -> None:
    trainer = make_trainer(rotary_base=12_345.0)
    steps(trainer, micro_batches, range(3))
    folder = trainer.save(checkpoint.step_folder(tmp_path, 3), {"step": 3, "cursor": 17})
    expected = steps(trainer, micro_batches, range(3, 8))
    again = make_trainer()
    state = again.load(folder)
    assert (state["step"], state["cursor"]) == (3, 17)
    assert again.model.rotary_base == 12_345.0
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


def test_damaged_and_partial_checkpoints_are_named_and_skipped(make_trainer, tmp_path, caplog) -> None:
    trainer = make_trainer()
    for step in (1, 2, 3):
        trainer.save(checkpoint.step_folder(tmp_path, step), {"step": step})
    (checkpoint.step_folder(tmp_path, 3) / checkpoint.MANIFEST).unlink()
    damaged = checkpoint.step_folder(tmp_path, 2)
    shard = next(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (tmp_path / ".step_00000004.unfinished").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == checkpoint.step_folder(tmp_path, 1)
    assert "step_00000003" in caplog.text and "step_00000002" in caplog.text
    with pytest.raises(UsageError, match="damaged"):
        make_trainer().load(damaged)


def test_the_manifest_covers_every_file(make_trainer, tmp_path) -> None:
    folder = make_trainer().save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {checkpoint.MANIFEST}
    assert set(json.loads((folder / checkpoint.MANIFEST).read_text())) == files


def test_only_the_newest_are_kept(make_trainer, tmp_path) -> None:
    trainer = make_trainer()
    for step in (1, 2, 3):
        trainer.save(checkpoint.step_folder(tmp_path, step), {"step": step})
    checkpoint.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_the_model_of_a_checkpoint_alone(make_trainer, tmp_path) -> None:
    from m1.profile import Parallel

    trainer = make_trainer(rotary_base=20_000.0)
    folder = trainer.save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    model = checkpoint.load_model(folder, trainer.model.settings, Parallel())
    assert model.rotary_base == 20_000.0 and not model.training
    for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
