"""Parameters of a distributed checkpoint without the model: the saved bits, and nothing but tensors is unpickled."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from m1.errors import UsageError
from m1.training import checkpoint


def test_every_parameter_as_saved(make_trainer, micro_batches, tmp_path) -> None:
    """Beside the optimizer's state, after a step."""
    from m1.formats.megatron import CheckpointTensors
    from m1.training.trainer import language_model_loss

    trainer = make_trainer(rotary_base=12_345.0)
    trainer.step(micro_batches(0), language_model_loss, 1e-3)
    source = CheckpointTensors(trainer.save(checkpoint.step_folder(tmp_path, 1), {"step": 1}))
    assert source.rotary_base == 12_345.0
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(source(name), parameter), name
    for unknown in ("9.input_layernorm.weight", "0.mlp.experts.local_experts.2.linear_fc1.weight"):
        with pytest.raises(UsageError, match="has no parameter decoder"):
            source(f"decoder.layers.{unknown}")


class _Harmful:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_table_of_contents_runs_nothing(make_trainer, tmp_path) -> None:
    from m1.formats.megatron import CheckpointTensors

    folder = make_trainer().save(checkpoint.step_folder(tmp_path, 1), {"step": 1})
    (folder / ".metadata").write_bytes(pickle.dumps(_Harmful(str(tmp_path / "ran"))))
    with pytest.raises(UsageError, match=r"not a table of contents: it names (posix|nt)\.system"):
        CheckpointTensors(folder)
    assert not (tmp_path / "ran").exists()
    (folder / ".metadata").unlink()
    with pytest.raises(UsageError, match=r"no \.metadata"):
        CheckpointTensors(folder)
    with pytest.raises(UsageError, match=r"no state\.json"):
        CheckpointTensors(tmp_path)
