"""Run under torchrun by test_parallel_losses: jobs at several layouts, one after another in the same processes.

usage: parallel_worker.py JOBS FOLDER   where JOBS is a JSON file: a list of {"name", "kind", "layout", ...}, and every
result goes to FOLDER/NAME.pt
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import layout_case
import torch
import torch.distributed as dist
from small_model import SMALL

from m1.config.parallel import Parallel
from m1.model.hybrid import build_model
from m1.training import parallel


def gathered(tensor: torch.Tensor, dim: int, group) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def joined(tensor: torch.Tensor, name: str, dim: int, group) -> torch.Tensor:
    """A split weight in one piece; the gate and up halves of an expert are split one by one."""
    halves = tensor.chunk(2) if "linear_fc1" in name else (tensor,)
    return torch.cat([gathered(half, dim, group) for half in halves])


def gradients(layout: Parallel) -> dict:
    """Logits, whole weights and whole gradients of a loss that weights the logits with fixed random numbers."""
    parallel.initialize(layout, 1)
    model = build_model(SMALL, layout, seed=7, rotary_base=50_000.0)
    groups = model.pg_collection
    tokens = torch.randint(0, SMALL.vocab_size, (2, 64), generator=torch.Generator().manual_seed(3))
    part = model(tokens, torch.arange(64).expand_as(tokens), None)
    logits = gathered(part.detach(), -1, groups.tp)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).chunk(groups.tp.size(), -1)
    (part * weights[groups.tp.rank()]).sum().backward()
    gradients, parameters = {}, {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        expert = ".experts." in name
        # Sequence parallel: norms, routers and unsplit experts saw this rank's tokens only.
        if getattr(parameter, "sequence_parallel", False) or (expert and groups.expt_tp.size() == 1):
            dist.all_reduce(gradient, group=groups.tp)
        whole, group = parameter.detach(), groups.expt_tp if expert else groups.tp
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            whole, gradient = (joined(t, name, parameter.partition_dim, group) for t in (whole, gradient))
        parameters[name], gradients[name] = whole, gradient
    return {"logits": logits, "parameters": parameters, "gradients": gradients}


def summed(ranks: list[int]) -> torch.Tensor:
    """The sum over some ranks of a random vector of each, as Megatron's gradient and parameter buffers exchange it."""
    from megatron.core.distributed import param_and_grad_buffer as buffers  # after m1.model has prepared it

    group = dist.new_group(ranks)
    whole = torch.empty(12)
    if dist.get_rank() in ranks:
        whole = torch.randn(12, generator=torch.Generator().manual_seed(dist.get_rank()))
        part = whole.chunk(len(ranks))[group.rank()]
        buffers.dist_reduce_scatter_func(part, whole, op=dist.ReduceOp.SUM, group=group, async_op=False)
        buffers.dist_all_gather_func(whole, part, group=group, async_op=False)
    dist.broadcast(whole, ranks[-1])
    return whole


def run(job: dict[str, Any]) -> Any:
    if job["kind"] == "sum":
        return summed(job["ranks"])
    layout = Parallel(world_size=dist.get_world_size(), **job["layout"])
    if job["kind"] == "gradients":
        return gradients(layout)
    return layout_case.train(layout, Path(job["checkpoint"]), form=job["form"])


def main() -> None:
    from megatron.core import parallel_state  # after m1.model has prepared it for this machine

    jobs, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        started = time.time()
        result = run(job)
        if dist.get_rank() == 0:
            torch.save(result, f"{folder}/{job['name']}.pt")
            print(f"{job['name']}: {time.time() - started:.1f} s", flush=True)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
