"""How long a training step takes at a layout, and the search for layouts that fit a number of GPUs and their memory.

Estimates rank layouts; they are not measurements. Every formula is in the docstring of the function that uses it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from m1.config.layout import batch_rules, broken_rules
from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.planning.arithmetic import LIGHTNING_BLOCK, parameters, training_flops
from m1.planning.memory import (
    RESERVE,
    Load,
    Memory,
    Stage,
    distinct_stages,
    expert_data_parallel_size,
    largest,
    local_parameters,
    pipeline_stages,
    states,
)
from m1.planning.work import H800_FLOPS
from m1.planning.work import load as load_of_rank
from m1.run.stage import Steps

Precision = Literal["fp32", "bf16"]
#: Largest micro-batch that the search tries, in sequences.
MICRO_BATCHES = 8


@dataclass(frozen=True)
class Hardware:
    """A cluster.

    Attributes:
        memory: bytes of one GPU.
        flops: peak of one GPU in bfloat16.
        efficiency: share of the peak that large matrix products reach; this project's choice.
        node_size: GPUs joined by NVLink.
        inside, outside: bytes a second that one GPU sends within a node, and to another node. The defaults are those
            of an H800 cluster: NVLink of 400 GB/s both ways, measured at 160 GB/s in one, and one 400 Gb/s InfiniBand
            adapter for each GPU (DeepSeek-V3, arXiv 2412.19437 §3.2.2).
    """

    memory: float = 80e9
    flops: float = H800_FLOPS
    efficiency: float = 0.6
    node_size: int = 8
    inside: float = 160e9
    outside: float = 50e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: matrix products and attention of the slowest pipeline stage over all micro-batches.
        tensor, expert, context, pipeline: communication by kind of group, over all micro-batches.
        bubble: waiting of the pipeline.
        data: gradients to their owners and weights back, once a step.
    """

    compute: float
    tensor: float
    expert: float
    context: float
    pipeline: float
    bubble: float
    data: float

    @property
    def communication(self) -> float:
        return self.tensor + self.expert + self.context + self.pipeline + self.data

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble


@dataclass(frozen=True)
class Candidate:
    """A possible layout, whether or not it fits.

    Attributes:
        fullest: the pipeline stage that needs most memory, 0-based.
        mfu: operations without recomputation over what all GPUs could do in the time.
    """

    parallel: Parallel
    load: Load
    fullest: int
    memory: Memory
    time: StepTime
    mfu: float


def step_time(model: Model, parallel: Parallel, load: Load, hardware: Hardware) -> StepTime:
    """Estimate of one optimizer step.

    - compute: operations of a micro-batch on the slowest stage, shared by its t c ranks, at `efficiency` of the peak;
      forward 1, backward 2, and 1 more when recomputing.
    - communication is all exposed: the trainer overlaps none of it. Bandwidth is that of NVLink where the whole group
      fits in a node, else that of the network; Megatron-core numbers ranks tensor, context, data, pipeline (dense) and
      expert-tensor, expert, data, pipeline (experts). Latency is left out.
    - bubble: (p - 1) / v micro-batches' time (arXiv 2104.04473 §2.2), where a micro-batch takes what it takes on the
      slowest stage.
    - The optimizer's own arithmetic is left out: it reads and writes some 30 bytes for each weight that a rank owns.
    """
    micro, pipeline = load.micro_batches, parallel.pipeline_model_parallel_size
    per_stage = [_stage_seconds(model, parallel, load, hardware, stage) for stage in distinct_stages(model, parallel)]
    slowest = max(per_stage, key=sum)
    compute, tensor, expert, context, between = (micro * part for part in slowest)
    bubble = (pipeline - 1) / parallel.virtual_pipeline_model_parallel_size * sum(slowest)
    data = max(_data_parallel_seconds(model, parallel, hardware, stage) for stage in {0, pipeline - 1})
    return StepTime(compute, tensor, expert, context, between, bubble, data)


def _stage_seconds(
    model: Model, parallel: Parallel, load: Load, hardware: Hardware, stage: int
) -> tuple[float, float, float, float, float]:
    """(compute, tensor, expert, context, pipeline) seconds of one micro-batch, forward and backward."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    q = 2 if parallel.precision == "bf16" else 4
    tokens = load.micro_batch_size * load.sequence_length / context
    mine, hidden = tokens / tensor, model.hidden_size
    held = pipeline_stages(model, parallel)[stage]
    flops = _stage_flops(model, load, held)
    head = 2 * load.micro_batch_size * load.sequence_length * model.vocab_size * hidden
    forward = 2 if parallel.recompute == "full" else 1  # forward passes of a layer
    compute = flops * (forward + 2) + (head * 3 if held.last else 0)
    compute /= tensor * context * hardware.flops * hardware.efficiency
    # Sequence parallelism: gather before and reduce-scatter after attention, forward and backward; the gather once
    # more for the gradient of the weights.
    messages = held.layers * (2 * forward + 3)
    of_tensor = messages * q * tokens * hidden * (tensor - 1) / tensor / _speed(tensor, hardware)
    routed = q * mine * model.moe_router_topk * hidden
    exchanges = held.layers * 2 * (forward + 1)  # to the experts and back
    of_expert = exchanges * routed * (expert - 1) / expert / _speed(expert * expert_tensor, hardware)
    of_expert += exchanges * routed * (expert_tensor - 1) / _speed(expert_tensor, hardware)
    states = held.lightning * 4 * load.micro_batch_size * model.num_attention_heads / tensor * model.head_dim**2
    keys = held.softmax * q * tokens * 2 * model.num_query_groups * model.head_dim / tensor
    of_context = (forward + 1) * (states + keys) * (context - 1) / _speed(tensor * context, hardware)
    sent = 2 * len(held.chunks) * q * mine * hidden if pipeline > 1 else 0.0
    speed = _speed(parallel.world_size // pipeline * 2, hardware)
    return compute, of_tensor, of_expert, of_context, sent / speed


def _stage_flops(model: Model, load: Load, held: Stage) -> float:
    """Forward operations of one micro-batch in so many layers, as `arithmetic.forward_flops` counts them."""
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
    groups = model.num_query_groups * model.head_dim
    block = min(LIGHTNING_BLOCK, load.sequence_length)
    sparse = 3 * hidden * model.moe_ffn_hidden_size * model.moe_router_topk + model.num_experts * hidden
    per_token = 2 * held.layers * sparse
    per_token += held.lightning * (10 * hidden * width + width * (2 * block + 4 * model.head_dim))
    per_token += held.softmax * (4 * hidden * (width + groups) + 2 * width * (load.sequence_length + 1))
    return per_token * load.micro_batch_size * load.sequence_length


def _data_parallel_seconds(model: Model, parallel: Parallel, hardware: Hardware, stage: int) -> float:
    """float32 gradients to the ranks that own them, weights back, in both data-parallel groups."""
    count = local_parameters(model, parallel, stage)
    weight = 2 if parallel.precision == "bf16" else 4
    replicas = parallel.data_parallel_size * parallel.context_parallel_size
    expert_replicas = expert_data_parallel_size(parallel)
    dense = (4 + weight) * count.dense + 8 * count.head
    sparse = (4 + weight) * count.experts
    of_stage = parallel.world_size // parallel.pipeline_model_parallel_size
    of_experts = of_stage if expert_replicas > 1 else 1
    return dense * (replicas - 1) / replicas / _speed(of_stage, hardware) + sparse * (
        expert_replicas - 1
    ) / expert_replicas / _speed(of_experts, hardware)


def _speed(group: int, hardware: Hardware) -> float:
    """Bytes a second for a group that spans `group` consecutive ranks."""
    return hardware.inside if group <= hardware.node_size else hardware.outside


# --- search ---------------------------------------------------------------------------------------------------------


def estimate(model: Model, parallel: Parallel, work: Steps, hardware: Hardware) -> Candidate:
    """Memory and time of a possible layout."""
    load = load_of_rank(work, parallel)
    fullest, needed = largest(model, parallel, load)
    time = step_time(model, parallel, load, hardware)
    useful = training_flops(model, work.global_batch_size * work.sequence_length, work.sequence_length)
    mfu = useful / (time.total * hardware.flops * parallel.world_size)
    return Candidate(parallel, load, fullest, needed, time, mfu)


def fits(candidate: Candidate, hardware: Hardware) -> bool:
    """Whether the layout leaves the reserve of the GPU's memory free."""
    return candidate.memory.total <= hardware.memory * (1 - RESERVE)


def search(
    model: Model, work: Steps, gpus: int, hardware: Hardware, *, precision: Precision = "bf16"
) -> list[Candidate]:
    """Every possible layout of `gpus` GPUs that fits, fastest first.

    Micro-batches of up to MICRO_BATCHES sequences are tried in place of the stage's own. Of a layout with and without
    recomputation the one without is taken where it fits: it does less and computes the same.
    """
    found = list(_fitting(model, work, gpus, hardware, precision))
    return sorted(found, key=lambda candidate: candidate.time.total)


def smallest_cluster(
    model: Model, work: Steps, hardware: Hardware, *, precision: Precision = "bf16", limit: int = 16_384
) -> int | None:
    """The smallest number of GPUs with a layout that fits, among parts of a node and whole nodes; None above `limit`.

    No layout needs less than weights, gradients and optimizer states in one copy each, so the search starts there.
    """
    each = 18 if precision == "bf16" else 16
    least = math.ceil(each * parameters(model).total / (hardware.memory * (1 - RESERVE)))
    parts = [n for n in _divisors(hardware.node_size)][:-1]
    for gpus in (*parts, *range(hardware.node_size, limit + 1, hardware.node_size)):
        if gpus >= least and next(_fitting(model, work, gpus, hardware, precision), None) is not None:
            return gpus
    return None


def _fitting(model: Model, work: Steps, gpus: int, hardware: Hardware, precision: Precision) -> Iterator[Candidate]:
    batches = [replace(work, micro_batch_size=b) for b in _divisors(work.global_batch_size) if b <= MICRO_BATCHES]
    room = hardware.memory * (1 - RESERVE)
    for parallel in _layouts(model, gpus, precision):
        if broken_rules(model, parallel, sequence_length=work.sequence_length):
            continue
        if max(sum(states(model, parallel, stage)) for stage in _ends(parallel)) > room:
            continue  # whatever the batch
        for tried in batches:
            if batch_rules(parallel, tried.global_batch_size, tried.micro_batch_size):
                continue
            for recompute in ("none", "full"):
                candidate = estimate(model, parallel.model_copy(update={"recompute": recompute}), tried, hardware)
                if fits(candidate, hardware):
                    yield candidate
                    break


def _ends(parallel: Parallel) -> set[int]:
    return {0, parallel.pipeline_model_parallel_size - 1}


def _layouts(model: Model, gpus: int, precision: Precision) -> Iterator[Parallel]:
    """Layouts of `gpus` ranks whose groups multiply to it; tensor parallelism stays within eight ranks."""
    for tensor in (t for t in _divisors(gpus) if t <= 8):
        for pipeline in (p for p in _divisors(gpus // tensor) if model.num_layers % p == 0):
            experts = [e for e in _divisors(gpus // pipeline) if model.num_experts % e == 0]
            contexts, chunks = _divisors(gpus // tensor // pipeline), _chunks(model, pipeline)
            for context, expert, split, virtual in itertools.product(contexts, experts, {1, tensor}, chunks):
                yield Parallel.model_construct(
                    world_size=gpus,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    virtual_pipeline_model_parallel_size=virtual,
                    context_parallel_size=context,
                    expert_model_parallel_size=expert,
                    expert_tensor_parallel_size=split,
                    precision=precision,
                )


def _chunks(model: Model, pipeline: int) -> list[int]:
    """Chunks of the interleaved schedule: one, or any number that cuts a stage's layers evenly."""
    if pipeline == 1:
        return [1]
    return [v for v in _divisors(model.num_layers // pipeline) if v <= 10]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
