"""Trains a small hybrid at one parallel layout after the other, each from a checkpoint or from the beginning.

Run by test_resharding under torchrun: layout_worker.py FOLDER TASKS, where TASKS is JSON, a list of `Task` fields. What
each task measured goes to FOLDER/<name>.json, its checkpoint to FOLDER/<name>. In one process the test calls `perform`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer
from m1.training import parallel
from m1.training.batch import Batch, full_batch
from m1.training.data import share
from m1.training.trainer import Trainer, language_model_loss

MODEL = Model(
    num_layers=4, softmax_every=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=16,
    num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, vocab_size=320, max_position_embeddings=256,
)  # fmt: skip
#: Micro-batches per step, over all data-parallel ranks; two sequences of 32 tokens in each.
GLOBAL = 4


@dataclass
class Task:
    """Steps `first` to `last` (not included) at `layout`, from checkpoint `start` if there is one."""

    name: str
    first: int
    last: int
    start: str | None = None
    layout: dict = field(default_factory=dict)
    forget_optimizer: bool = False


def micro_batches(step: int) -> list[Batch]:
    """This rank's part of the step's batch, which is the same at every layout."""
    generator = torch.Generator().manual_seed(step)
    whole = [full_batch(torch.randint(0, MODEL.vocab_size, (2, 33), generator=generator)) for _ in range(GLOBAL)]
    return share(whole, parallel.data_parallel_rank(), parallel.data_parallel_size())


def perform(folder: Path, task: Task) -> None:
    layout = Parallel(world_size=torch.distributed.get_world_size(), **task.layout)
    parallel.initialize(layout, 1)
    trainer = Trainer(MODEL, layout, seed=3, optimizer=Optimizer(eps=1e-8, weight_decay=0.1))
    if task.start is not None:
        assert trainer.load(folder / task.start, optimizer=not task.forget_optimizer)["step"] == task.first
    measured = []
    for step in range(task.first, task.last):
        metrics = trainer.step(micro_batches(step), language_model_loss, 1e-3 * (step + 1) / 4)
        measured.append([metrics["loss"], metrics["grad_norm"]])
    trainer.save(folder / task.name, {"step": task.last})
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # the last pipeline stage has the loss
        (folder / f"{task.name}.json").write_text(json.dumps(measured))
    torch.distributed.barrier()


def main() -> None:
    from megatron.core import parallel_state

    from m1.model import devices

    folder, tasks = Path(sys.argv[1]), [Task(**fields) for fields in json.loads(sys.argv[2])]
    torch.distributed.init_process_group(devices.backend())
    for task in tasks:
        perform(folder, task)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
