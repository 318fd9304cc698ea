"""Process groups and random state of a training process."""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy
import torch
import torch.distributed

from m1.config.parallel import Parallel
from m1.model import devices

T = TypeVar("T")


def initialize(parallel: Parallel, seed: int) -> None:
    """Join the process group that torchrun describes (or make one of one process) and set up Megatron's groups.

    Args:
        seed: seeds Python, numpy and torch alike on every rank; model-parallel regions get Megatron's own offsets.
    """
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(parallel.threads_per_rank)
    if not torch.distributed.is_initialized():
        if devices.has_gpu():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" in os.environ:
            torch.distributed.init_process_group(devices.backend(), timeout=datetime.timedelta(minutes=10))
        else:
            _single_process_group()
    world = torch.distributed.get_world_size()
    if world != parallel.world_size:
        raise ValueError(f"started with {world} ranks, but the profile's parallel.world_size is {parallel.world_size}")
    chunks = parallel.virtual_pipeline_model_parallel_size
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _single_process_group() -> None:
    """A group of this process alone, on a port that the store picks."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    torch.distributed.init_process_group(devices.backend(), store=store, rank=0, world_size=1)


def shutdown() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank()


def data_parallel_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def share_of_rank(items: Sequence[T]) -> list[T]:
    """The items this data-parallel rank works on; `gather_shares` puts the results back in order."""
    return list(items[data_parallel_rank() :: data_parallel_size()])


def gather_shares(mine: list[T], total: int) -> list[T]:
    """Every rank's results, in the order of the items that `share_of_rank` split; the same list on every rank."""
    from megatron.core import parallel_state

    shares: list[list[T]] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    torch.distributed.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
