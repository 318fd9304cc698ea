"""Impossible layouts are refused with the rule that they break, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from m1.config import layout
from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.errors import UsageError
from m1.run import profiles as profile

MODEL = Model(
    num_layers=8, softmax_every=4, hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
    num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=40, vocab_size=320, max_position_embeddings=1024,
)  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "pipeline_layers": [3, 5]},
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_layers": [1, 3, 2, 2],
        },
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "expert_model_parallel_size": 4},
    ],
)
def test_possible_layouts_break_no_rule(sizes: dict[str, Any]) -> None:
    parallel = Parallel(world_size=4, **sizes)
    assert layout.broken_rules(MODEL, parallel, sequence_length=64, global_batch_size=8) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"tensor_model_parallel_size": 4}, ["num_query_groups=2", "tensor_model_parallel_size=4"]),
        (
            {"tensor_model_parallel_size": 8, "world_size": 8},
            ["num_attention_heads=4", "tensor_model_parallel_size=8"],
        ),
        ({"expert_model_parallel_size": 3, "world_size": 3}, ["num_experts=4", "expert_model_parallel_size=3"]),
        (
            {"expert_tensor_parallel_size": 3, "world_size": 3},
            ["moe_ffn_hidden_size=40", "expert_tensor_parallel_size=3"],
        ),
        ({"pipeline_model_parallel_size": 3, "world_size": 3}, ["num_layers=8", "pipeline_model_parallel_size=3"]),
        ({"pipeline_model_parallel_size": 2, "pipeline_layers": [3, 3, 2]}, ["3 stages", "makes 2"]),
        ({"pipeline_model_parallel_size": 2, "pipeline_layers": [3, 4]}, ["places 7 layers", "num_layers=8"]),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            ["virtual_pipeline_model_parallel_size=2", "pipeline_model_parallel_size above 1"],
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 8},
            ["num_layers=8", "pipeline_model_parallel_size=2 x virtual_pipeline_model_parallel_size=8"],
        ),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_length": 62},
            ["sequence_length=62", "context_parallel_size=2 x tensor_model_parallel_size=2"],
        ),
        ({"global_batch_size": 6}, ["global_batch_size=6", "data-parallel size 4"]),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "global_batch_size": 6},
            ["3 micro-batches", "interleaved", "pipeline_model_parallel_size=2"],
        ),
    ],
)
def test_an_impossible_layout_names_the_rule(overrides: dict[str, Any], words: list[str]) -> None:
    shape = {"sequence_length": 64, "global_batch_size": 8}
    shape.update({name: overrides.pop(name) for name in list(overrides) if name in shape})
    broken = layout.broken_rules(MODEL, Parallel(**{"world_size": 4, **overrides}), **shape)
    assert any(all(word in rule for word in words) for rule in broken), broken


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"parallel.context_parallel_size": 4}, ["world_size=2", "tensor x pipeline x context parallel = 4"]),
        ({"parallel.expert_model_parallel_size": 4}, ["world_size=2", "expert-tensor x expert x pipeline"]),
        (
            {"parallel.pipeline_model_parallel_size": 2, "parallel.pipeline_layers": [9, 1]},
            ["parallel", "pipeline_layers places 10 layers of num_layers=8"],
        ),
        (
            {"parallel.tensor_model_parallel_size": 2, "pretrain.sequence_length": 255},
            ["pretrain", "sequence_length=255", "tensor_model_parallel_size=2"],
        ),
        (
            {"parallel.context_parallel_size": 2, "sft.text.sequence_length": 127},
            ["sft.text", "sequence_length=127", "context_parallel_size=2"],
        ),
        ({"parallel.moe_token_dispatcher": "flex"}, ["parallel.moe_token_dispatcher", "'alltoall' or 'allgather'"]),
        ({"parallel.moe_expert_capacity_factor": 0.0}, ["parallel.moe_expert_capacity_factor", "greater than 0"]),
        ({"parallel.pipeline_layers": [0, 8]}, ["parallel.pipeline_layers", "greater than or equal to 1"]),
        ({"parallel.recompute": "selective"}, ["parallel.recompute", "'none' or 'full'"]),
    ],
)
def test_a_profile_with_an_impossible_layout_is_refused(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        profile.load("tiny", overrides=overrides)
    for word in words:
        assert word in str(caught.value)
