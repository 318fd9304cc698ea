"""Run under torchrun by test_stored: a base model read at several layouts of two ranks, put together and compared.

usage: import_worker.py BASE WHOLE LAYOUT...   where BASE is an exported folder of the small hybrid, WHOLE a safetensors
file with its parameters by their names on one rank, and a layout as in parallel_worker.py. A checkpoint of every layout
is left beside WHOLE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_worker import joined
from safetensors.torch import load_file
from small_model import SMALL

from m1.config.parallel import Parallel
from m1.formats import folder as interchange
from m1.formats import weights as base
from m1.model.hybrid import build_model, global_name
from m1.training import checkpoint, parallel


def check(folder: Path, whole: dict[str, torch.Tensor], layout: Parallel, saved: Path) -> None:
    """Load the base model, compare every parameter, and save a checkpoint as this layout writes it."""
    from megatron.core import parallel_state

    parallel.initialize(layout, 1)
    settings = SMALL.model_copy(update={"rotary_base": 50_000.0})
    ends = dict(
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage()
    )
    model = build_model(settings, layout, seed=1, **ends)
    base.load(interchange.inspect(folder, settings), model)
    for name, parameter in model.named_parameters():
        found = parameter.detach()
        group = model.pg_collection.expt_tp if ".experts." in name else model.pg_collection.tp
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            found = joined(found, name, parameter.partition_dim, group)
        assert torch.equal(found, whole[global_name(model, name)]), name
    checkpoint.save(saved, model, None, {"rotary_base": model.rotary_base})


def main() -> None:
    from megatron.core import parallel_state  # after m1.model has prepared it for this machine

    folder, file, *layouts = sys.argv[1:]
    whole = load_file(file)
    for text in layouts:
        sizes = {name: int(size) for name, size in (field.split("=") for field in text.split(","))}
        check(Path(folder), whole, Parallel(world_size=2, **sizes), Path(file).parent / text)
        os.write(1, f"equal {text} rank {dist.get_rank()}\n".encode())  # in one piece: both ranks share the pipe
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
