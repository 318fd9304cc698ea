"""What Megatron-core itself allocates on one rank of a layout, without a GPU and without memory.

    python -m m1.training.measure --profile m1-456b --rank 0 --rank 511

The trainer is built by the same code as in a run, on torch's meta device, in a process group that only pretends to have
the other ranks; its weights, gradient buffers and optimizer shards are then counted. One JSON object per rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.pretrain import Pretrain
from m1.config.training import Optimizer
from m1.run.profiles import load


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Everything that is made inside has a shape and a type and no content."""
    import m1.model  # noqa: F401  (prepares Megatron-core for this machine)

    current, type_name = torch.cuda.current_device, torch.Tensor.type

    def without_meta(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = type_name(self, *args, **kwargs)
        # "torch.cuda.meta.FloatTensor" on a machine with a GPU; the CPU's names have "cuda" put in once more.
        return re.sub(r"^torch\.[a-z.]*\.(?=[A-Z])", "torch.cuda.", named) if isinstance(named, str) else named

    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    torch.Tensor.type = without_meta  # type: ignore[assignment,method-assign]  # Megatron-core goes by type names
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device, torch.Tensor.type = current, type_name  # type: ignore[method-assign]


@contextlib.contextmanager
def pretended_world(parallel: Parallel, rank: int) -> Iterator[None]:
    """Process groups of `parallel.world_size` ranks of which only `rank` exists; nothing is communicated."""
    import m1.model  # noqa: F401
    from m1.training import parallel as groups

    # The package that has it is torch's own, for tests; it registers the backend "fake".
    from torch.testing._internal.distributed.fake_pg import FakeStore  # isort: skip

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        groups.initialize(parallel, 1)
        yield
    finally:
        groups.shutdown()


def count(model: Model, parallel: Parallel, rank: int, optimizer: Optimizer) -> dict[str, int]:
    """Parameters and bytes on one rank of a layout.

    Returns:
        "dense", "head", "experts", "norms" and "embedding" numbers of parameters ("dense" holds norms and embedding),
        "parameters", "gradients" and "optimizer" bytes.
    """
    from m1.training.trainer import Trainer

    with pretended_world(parallel, rank), on_meta():
        return count_trainer(Trainer(model, parallel, seed=1, optimizer=optimizer))


def count_trainer(trainer: Any) -> dict[str, int]:
    """The same of a trainer that exists."""
    named = [named for chunk in trainer.chunks for named in chunk.named_parameters()]
    experts = sum(p.numel() for name, p in named if ".experts." in name)
    head = sum(p.numel() for name, p in named if name.startswith("output_layer."))
    found = {
        "dense": sum(p.numel() for _, p in named) - experts - head,
        "head": head,
        "experts": experts,
        "norms": sum(p.numel() for _, p in named if p.dim() == 1),
        "embedding": sum(p.numel() for name, p in named if name.startswith("embedding.")),
        "parameters": sum(p.numel() * p.element_size() for _, p in named),
        "gradients": 0,
        "optimizer": 0,
    }
    for buffer in (x for ddp in trainer.ddps for x in (*ddp.buffers, *ddp.expert_parallel_buffers)):
        found["gradients"] += buffer.grad_data.numel() * buffer.grad_data.element_size()
    for part in trainer.optimizer.chained_optimizers:
        owned = [p for group in part.optimizer.param_groups for p in group["params"]]
        copies = [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
        # Two moments for every owned element; float32 copies of bfloat16 weights are the optimizer's own as well.
        found["optimizer"] += sum(2 * 4 * p.numel() for p in owned) + sum(4 * p.numel() for p in copies)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m m1.training.measure", description=__doc__)
    parser.add_argument("--profile", default="m1-456b")
    parser.add_argument("--rank", type=int, action="append", help="may be repeated; default 0")
    parser.add_argument("--alone", action="store_true", help="one rank that holds the whole model, no layout")
    options = parser.parse_args()
    settings = load(options.profile)
    parallel = Parallel(precision=settings.parallel.precision) if options.alone else settings.parallel
    for rank in options.rank or [0]:
        found = count(settings.model, parallel, rank, settings.section("pretrain", Pretrain).optimizer)
        print(json.dumps({"profile": settings.name, "rank": rank, **found}), flush=True)


if __name__ == "__main__":
    main()
