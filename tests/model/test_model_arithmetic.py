"""Closed-form counts against the published model and against built ones."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_model import SMALL

from m1.config.model import Model
from m1.planning import arithmetic

#: config.json of the released MiniMax-M1.
PUBLISHED = Model(
    num_layers=80, softmax_every=8, hidden_size=6144, num_attention_heads=64, num_query_groups=8, head_dim=128,
    num_experts=32, moe_router_topk=2, moe_ffn_hidden_size=9216, vocab_size=200_064, rotary_base=1e7,
    max_position_embeddings=10_240_000,
)  # fmt: skip


def test_published_parameter_counts():
    counts = arithmetic.parameters(PUBLISHED)
    assert round(counts.total / 1e9, 2) == 456.09
    assert round(counts.active / 1e9, 3) == 45.943
    assert counts.embedding == counts.head == 1_229_193_216
    assert arithmetic.softmax_layers(PUBLISHED) == 10


def test_published_checkpoint_bytes():
    """`total_size` of the released checkpoint's index, to the byte."""
    assert arithmetic.checkpoint_bytes(PUBLISHED) == 912_210_767_872


def test_float32_head_adds_two_bytes_a_weight():
    larger = arithmetic.checkpoint_bytes(PUBLISHED, float32_head=True)
    assert larger - arithmetic.checkpoint_bytes(PUBLISHED) == 2 * 200_064 * 6144
    everything = arithmetic.checkpoint_bytes(PUBLISHED, precision="fp32")
    assert everything == 4 * arithmetic.parameters(PUBLISHED).total


def test_total_is_the_sum_of_its_parts():
    counts = arithmetic.parameters(SMALL)
    parts = dataclasses.asdict(counts)
    assert counts.total == sum(value for name, value in parts.items() if name != "active_experts")


def test_counts_of_a_built_model(hybrid):
    sizes = {name: parameter.numel() for name, parameter in hybrid.named_parameters()}
    counts = arithmetic.parameters(SMALL)
    assert counts.total == sum(sizes.values())
    assert counts.experts == sum(size for name, size in sizes.items() if ".experts." in name)
    assert counts.active_experts * SMALL.num_experts == counts.experts * SMALL.moe_router_topk
    assert counts.router == sum(size for name, size in sizes.items() if ".router." in name)
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert counts.norms == norms
    attention = sum(size for name, size in sizes.items() if "self_attention" in name and "norm" not in name)
    assert counts.lightning + counts.softmax == attention


def test_forward_flops_match_the_matrix_products_that_torch_counts(hybrid, tokens):
    """Counted by torch's own dispatcher: every matrix product outside the attention kernels."""
    import torch
    from small_model import logits_of
    from torch.utils.flop_counter import FlopCounterMode

    mode = FlopCounterMode(display=False)
    with mode:
        logits_of(hybrid, tokens[:, :256])
    count = sum(n for op, n in mode.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)
    counts = arithmetic.parameters(SMALL)
    assert count == 2 * 256 * 2 * (counts.active + counts.head)


def test_decode_flops_of_the_published_model():
    """70 x 64 heads x 5 x 128^2 for lightning, 10 x 64 x 4 x 128 for each attended token of the softmax layers."""
    flops = arithmetic.decode_flops(PUBLISHED, 1000)
    assert flops.lightning == 367_001_600
    assert flops.softmax == 327_680 * 1000
    assert flops.linear == 2 * arithmetic.parameters(PUBLISHED).active
    assert flops.total == flops.linear + flops.head + flops.softmax + flops.lightning


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_only_softmax_decoding_grows_with_the_context(short, more):
    near, far = arithmetic.decode_flops(SMALL, short), arithmetic.decode_flops(SMALL, short + more)
    assert (near.linear, near.head, near.lightning) == (far.linear, far.head, far.lightning)
    assert far.softmax - near.softmax == more * 4 * SMALL.head_dim * SMALL.num_attention_heads


@given(st.integers(1, 4096))
def test_softmax_part_of_training_is_the_sum_over_positions(length):
    """Forward attention over a causal sequence is decoding's cost added up over its positions."""
    only_softmax = SMALL.model_copy(update={"softmax_every": 1})
    counts = arithmetic.parameters(only_softmax)
    attention = arithmetic.forward_flops(only_softmax, length, length) - 2 * length * (counts.active + counts.head)
    by_position = arithmetic.decode_flops(only_softmax, 1).softmax * length * (length + 1) / 2
    assert attention == pytest.approx(by_position, rel=1e-9)


def test_training_is_three_times_the_forward_pass_and_linear_in_tokens():
    assert arithmetic.training_flops(SMALL, 10, 64) == 3 * arithmetic.forward_flops(SMALL, 10, 64)
    assert arithmetic.training_flops(SMALL, 20, 64) == 2 * arithmetic.training_flops(SMALL, 10, 64)
