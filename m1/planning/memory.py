"""Bytes on one rank while it trains, part by part, in closed form; no torch, no weights.

Notation: hidden size D, heads of total width W, key/value width K, F channels in each of E experts, k experts for a
token, vocabulary V; tensor, pipeline, virtual pipeline, context, expert and expert-tensor parallel sizes t, p, v, c, e
and f; data-parallel size d. `q` is the size of an activation: 2 bytes in bfloat16, 4 in float32. 1 GB is 10^9 bytes.

What is counted is what this project's trainer keeps (`m1.training.trainer`): Megatron-core's DistributedDataParallel
with gradients in float32 and its distributed optimizer (megatron-core 0.16, `distributed/param_and_grad_buffer.py` and
`optimizer/distrib_optimizer.py`; the idea is ZeRO stage 1, arXiv 1910.02054), and for the activations the tensors that
the layers of `m1.model` save for their backward pass. Tests count the same bytes on built models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from m1.config.model import Model
from m1.config.parallel import Parallel

#: Share of a GPU's memory left for what is not counted: CUDA context, NCCL buffers, temporaries, fragmentation.
RESERVE = 0.08


@dataclass(frozen=True)
class Load:
    """What a training step gives one rank.

    Attributes:
        sequence_length: tokens of a sequence, before it is cut over context-parallel ranks.
        micro_batch_size: sequences of a micro-batch.
        micro_batches: micro-batches of a step on every data-parallel rank.
    """

    sequence_length: int
    micro_batch_size: int
    micro_batches: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: weights as the forward pass reads them.
        gradients: Megatron's gradient buffer.
        optimizer: this rank's part of AdamW's two moments and, beside bfloat16 weights, of the float32 weights.
        activations: what all micro-batches in flight keep for their backward pass.
        logits: the LM head's float32 input and output and the buffers of the cross entropy.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds.

    Attributes:
        chunks: 0-based layers of every chunk; one chunk without the interleaved schedule.
        lightning, softmax: how many layers of each kind.
        first, last: whether it has the embedding, and the head.
    """

    chunks: tuple[tuple[int, ...], ...]
    lightning: int
    softmax: int
    first: bool
    last: bool

    @property
    def layers(self) -> int:
        return self.lightning + self.softmax


def pipeline_stages(model: Model, parallel: Parallel) -> tuple[Stage, ...]:
    """Every pipeline stage of a layout.

    Megatron-core numbers the chunks round the ranks: chunk j of rank i is part j p + i of the model.
    """
    placed = tuple(parallel.pipeline_layers) if parallel.pipeline_layers else None
    chunks = parallel.virtual_pipeline_model_parallel_size
    return _stages(model.num_layers, model.softmax_every, parallel.pipeline_model_parallel_size, chunks, placed)


@functools.lru_cache(maxsize=1024)
def _stages(
    layers: int, softmax_every: int, pipeline: int, chunks: int, placed: tuple[int, ...] | None
) -> tuple[Stage, ...]:
    sizes = placed or (layers // (pipeline * chunks),) * (pipeline * chunks)
    found = []
    for rank in range(pipeline):
        held = []
        for part in range(rank, pipeline * chunks, pipeline):
            start = sum(sizes[:part])
            held.append(tuple(range(start, start + sizes[part])))
        softmax = sum((layer + 1) % softmax_every == 0 for chunk in held for layer in chunk)
        count = sum(map(len, held))
        found.append(Stage(tuple(held), count - softmax, softmax, rank == 0, rank == pipeline - 1))
    return tuple(found)


def distinct_stages(model: Model, parallel: Parallel) -> list[int]:
    """The earliest stage of every kind: later ones of a kind have the same layers and fewer micro-batches in flight."""
    found: dict[tuple[int, int, bool, bool], int] = {}
    for rank, stage in enumerate(pipeline_stages(model, parallel)):
        found.setdefault((stage.lightning, stage.softmax, stage.first, stage.last), rank)
    return list(found.values())


def memory(model: Model, parallel: Parallel, load: Load, stage: int) -> Memory:
    """Bytes on a rank of pipeline stage `stage` (0-based) of a possible layout (`m1.config.layout.broken_rules`)."""
    weights, gradients, optimizer = states(model, parallel, stage)
    activations = _activations(model, parallel, load, stage)
    logits = _logits(model, parallel, load) if stage == parallel.pipeline_model_parallel_size - 1 else 0.0
    return Memory(weights, gradients, optimizer, activations, logits)


def largest(model: Model, parallel: Parallel, load: Load) -> tuple[int, Memory]:
    """The pipeline stage whose ranks need most, and what they need."""
    every = {stage: memory(model, parallel, load, stage) for stage in distinct_stages(model, parallel)}
    fullest = max(every, key=lambda stage: every[stage].total)
    return fullest, every[fullest]


# --- weights, gradients, optimizer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalParameters:
    """Numbers of parameters on one rank.

    Attributes:
        dense: in the precision of the run, the same on all data-parallel and context-parallel ranks: attention, norms,
            routers, embedding.
        head: float32 always; replicated like the dense ones.
        experts: the same only on ranks that hold the same experts.
    """

    dense: int
    head: int
    experts: int


def local_parameters(model: Model, parallel: Parallel, stage: int) -> LocalParameters:
    """Parameters on a rank of pipeline stage `stage`.

    Per layer: lightning attention 5DW/t + W/t, softmax attention (2DW + 2DK)/t, router ED, two norms 2D, experts
    3DFE/(ef). The first stage adds the embedding VD/t; the last one the head VD/t and the final norm D.
    """
    hidden, tensor = model.hidden_size, parallel.tensor_model_parallel_size
    width, groups = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    held = pipeline_stages(model, parallel)[stage]
    dense = held.layers * (2 * hidden + model.num_experts * hidden)
    dense += held.softmax * (2 * hidden * (width + groups) // tensor)
    dense += held.lightning * ((5 * hidden * width + width) // tensor)
    local_experts = model.num_experts // parallel.expert_model_parallel_size
    expert = 3 * hidden * model.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size
    experts = held.layers * local_experts * expert
    embedding = model.vocab_size * hidden // tensor
    dense += (embedding if held.first else 0) + (hidden if held.last else 0)
    head = embedding if held.last else 0
    return LocalParameters(dense, head, experts)


def expert_data_parallel_size(parallel: Parallel) -> int:
    """Ranks that hold the same experts: W / (p e f). MiniMax-01 §3.1: world = PP x EDP x ETP x EP."""
    return parallel.world_size // (
        parallel.pipeline_model_parallel_size
        * parallel.expert_model_parallel_size
        * parallel.expert_tensor_parallel_size
    )


def states(model: Model, parallel: Parallel, stage: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer states, which no batch changes.

    bfloat16 weights take 2 bytes, their gradients 4, and 12 (float32 weight and two moments) are shared by the
    replicas; float32 weights, the head among them, take 4, 4, and 8 shared. Replicas are the d c ranks of the
    data-parallel and context-parallel group for dense weights, and the expert-data-parallel group for experts.
    """
    count = local_parameters(model, parallel, stage)
    replicas = parallel.data_parallel_size * parallel.context_parallel_size
    expert_replicas = expert_data_parallel_size(parallel)
    weight, state = (2, 12) if parallel.precision == "bf16" else (4, 8)
    everything = count.dense + count.head + count.experts
    optimizer = (state * count.dense + 8 * count.head) / replicas + state * count.experts / expert_replicas
    return weight * (count.dense + count.experts) + 4 * count.head, 4 * everything, optimizer


# --- activations ----------------------------------------------------------------------------------------------------


def layer_activations(model: Model, parallel: Parallel, load: Load, *, softmax: bool) -> dict[str, float]:
    """Bytes that one layer keeps for its backward pass of one micro-batch, by what they are.

    With T = b s / c tokens on the tensor-parallel group, sequence parallelism leaves T/t of them to a rank in norms,
    router and residual. The norms work in float32 and keep their input and the input times 1/rms. With routing in
    balance a rank's experts see N = f k T/t tokens. This is what runs on GPUs; the compiled parts on a CPU keep less.
    """
    q = 2 if parallel.precision == "bf16" else 4
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens = load.micro_batch_size * load.sequence_length / context
    hidden, mine = model.hidden_size, tokens / tensor
    inner = tokens * model.num_attention_heads * model.head_dim / tensor  # T W / t
    kept = {"inside two norms, float32": 2 * 8 * mine * hidden, "norm outputs": 2 * q * mine * hidden}
    if softmax:
        # Keys and values are repeated for every query head, and gathered from the context-parallel ranks.
        kept["queries, keys, values"] = q * inner * (1 + 2 * context)
        kept["attention output"] = q * inner
        kept["log-sum-exp"] = 4 * inner / model.head_dim
    else:
        kept["queries, keys, values"] = 3 * q * inner
        kept["projection before SiLU"] = 3 * q * inner
        kept["inside the norm over heads, float32"] = 8 * inner
        kept["norm output, gate, gated"] = 3 * q * inner
    routed = mine * model.moe_router_topk * parallel.expert_tensor_parallel_size
    width = model.moe_ffn_hidden_size / parallel.expert_tensor_parallel_size
    kept["tokens sent to experts"] = q * routed * hidden
    kept["gates and ups of the experts"] = 2 * q * routed * width
    kept["routing"] = mine * model.num_experts * 13 + routed * 16
    return kept


def chunks_in_flight(parallel: Parallel, load: Load, stage: int) -> int:
    """Forward passes of a chunk whose backward pass is still to come, at most.

    1F1B (PipeDream-Flush): min(m, p - i) for rank i. Interleaved, in chunks: min(m v, 2 (p - i - 1) + (v - 1) p + 1)
    (megatron-core 0.16, `pipeline_parallel/schedules.py`; arXiv 2104.04473 §2.2).
    """
    pipeline, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if chunks == 1:
        return min(load.micro_batches, pipeline - stage)
    return min(load.micro_batches * chunks, 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1)


def _activations(model: Model, parallel: Parallel, load: Load, stage: int) -> float:
    """Bytes of all micro-batches in flight.

    Without recomputation: what every layer keeps, for each chunk in flight. With full recomputation, one layer at a
    time: the layers' inputs q T D / t, and once what one layer keeps while its backward pass runs.
    """
    q = 2 if parallel.precision == "bf16" else 4
    held = pipeline_stages(model, parallel)[stage]
    in_flight = chunks_in_flight(parallel, load, stage) / len(held.chunks)  # in passes through all of its layers
    counts = {True: held.softmax, False: held.lightning}
    kept = {
        softmax: sum(layer_activations(model, parallel, load, softmax=softmax).values())
        for softmax, count in counts.items()
        if count
    }
    if parallel.recompute == "full":
        tokens = load.micro_batch_size * load.sequence_length / parallel.context_parallel_size
        inputs = q * tokens / parallel.tensor_model_parallel_size * model.hidden_size
        return in_flight * held.layers * inputs + max(kept.values(), default=0.0)
    return in_flight * sum(counts[softmax] * size for softmax, size in kept.items())


def _logits(model: Model, parallel: Parallel, load: Load) -> float:
    """Bytes of head and loss, for the one micro-batch that the last stage works on.

    The final norm keeps 4 T D / t, the head its float32 input 4 T D / t, gathered to 4 T D where it is split. Logits
    take 4 T V / t. Megatron's cross entropy over a split vocabulary works in place; torch's keeps log-probabilities
    beside the logits and makes a gradient of the same size. Split logits of micro-batches above 1 are transposed into a
    copy.
    """
    tensor = parallel.tensor_model_parallel_size
    tokens = load.micro_batch_size * load.sequence_length / parallel.context_parallel_size
    vocabulary = 4 * tokens * model.vocab_size / tensor
    copies = (1 if tensor > 1 else 3) + (1 if tensor > 1 and load.micro_batch_size > 1 else 0)
    hidden = 4 * tokens * model.hidden_size
    return copies * vocabulary + 2 * hidden / tensor + (hidden if tensor > 1 else 0)
