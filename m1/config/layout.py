"""Which parallel layouts are possible for a model, and which rule an impossible one breaks.

Pure Python: profiles are checked with it before anything starts, and a search for layouts can ask it often. Every rule
is one clause that names the fields and their values.
"""

from __future__ import annotations

from m1.config.model import Model
from m1.config.parallel import Parallel, world_size_rules


def broken_rules(
    model: Model,
    parallel: Parallel,
    *,
    sequence_length: int | None = None,
    global_batch_size: int | None = None,
    micro_batch_size: int = 1,
) -> list[str]:
    """The rules that a layout breaks; none for a possible one.

    Args:
        sequence_length: tokens of a sequence; without it, rules about sequences are not checked.
        global_batch_size: sequences of a step; without it, rules about batches are not checked.
        micro_batch_size: sequences of a micro-batch.
    """
    broken = world_size_rules(parallel)
    if broken:
        return broken  # every other rule reads the sizes that these make sense of
    broken = split_rules(model, parallel) + pipeline_rules(model, parallel)
    if sequence_length is not None:
        broken += sequence_rules(parallel, sequence_length)
    if global_batch_size is not None:
        broken += batch_rules(parallel, global_batch_size, micro_batch_size)
    return broken


def split_rules(model: Model, parallel: Parallel) -> list[str]:
    """Every matrix that is cut is cut into equal parts: heads, vocabulary, experts, the width of an expert."""
    cuts = [
        ("num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size"),
        ("num_query_groups", model.num_query_groups, "tensor_model_parallel_size"),
        ("vocab_size", model.vocab_size, "tensor_model_parallel_size"),
        ("num_experts", model.num_experts, "expert_model_parallel_size"),
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor_parallel_size"),
    ]
    return [
        f"{name}={value} is not a multiple of {by}={getattr(parallel, by)}"
        for name, value, by in cuts
        if value % getattr(parallel, by)
    ]


def pipeline_rules(model: Model, parallel: Parallel) -> list[str]:
    """Every stage of the pipeline has layers, and together they have all of them."""
    pipeline, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages = pipeline * chunks
    sizes = f"pipeline_model_parallel_size={pipeline}"
    if chunks > 1:
        if pipeline == 1:
            return [
                f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size above 1: "
                "the interleaved schedule passes chunks between ranks"
            ]
        sizes += f" x virtual_pipeline_model_parallel_size={chunks}"
    placed = parallel.pipeline_layers
    if placed is None:
        if model.num_layers % stages:
            return [f"num_layers={model.num_layers} is not a multiple of {sizes}; place them with pipeline_layers"]
        return []
    broken = []
    if len(placed) != stages:
        broken.append(f"pipeline_layers has {len(placed)} stages, and {sizes} makes {stages}")
    if sum(placed) != model.num_layers:
        broken.append(f"pipeline_layers places {sum(placed)} layers of num_layers={model.num_layers}")
    return broken


def sequence_rules(parallel: Parallel, sequence_length: int) -> list[str]:
    """Context parallelism gives every rank an equal part of a sequence, and sequence parallelism cuts that again."""
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if sequence_length % (context * tensor):
        return [
            f"sequence_length={sequence_length} is not a multiple of context_parallel_size={context} x "
            f"tensor_model_parallel_size={tensor}"
        ]
    return []


def batch_rules(parallel: Parallel, global_batch_size: int, micro_batch_size: int) -> list[str]:
    """Every data-parallel rank has the same number of whole micro-batches, enough of them for the schedule."""
    replicas, pipeline = parallel.data_parallel_size, parallel.pipeline_model_parallel_size
    if global_batch_size % (micro_batch_size * replicas):
        return [
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
            f"data-parallel size {replicas}"
        ]
    micro_batches = global_batch_size // (micro_batch_size * replicas)
    if parallel.virtual_pipeline_model_parallel_size > 1 and micro_batches % pipeline:
        return [
            f"global_batch_size={global_batch_size} makes {micro_batches} micro-batches a rank, and the interleaved "
            f"schedule needs a multiple of pipeline_model_parallel_size={pipeline}"
        ]
    return []
