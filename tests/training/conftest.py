"""A very small hybrid and its trainer, in a process group of this process alone."""

from __future__ import annotations

import pytest
import torch

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer

VERY_SMALL = Model(
    num_layers=3, softmax_every=3, hidden_size=32, num_attention_heads=2, num_query_groups=1, head_dim=16,
    num_experts=2, moe_router_topk=2, moe_ffn_hidden_size=24, vocab_size=300, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture
def make_trainer():
    """Builds a trainer; every one starts from the same weights."""
    from m1.training import parallel
    from m1.training.trainer import Trainer

    parallel.initialize(Parallel(), 1)

    def make(precision="fp32", **settings):
        settings.setdefault("optimizer", Optimizer(eps=1e-8))
        return Trainer(VERY_SMALL, Parallel(precision=precision), seed=3, **settings)

    return make


@pytest.fixture
def micro_batches():
    """step -> two micro-batches of two sequences."""
    from m1.training.batch import full_batch

    def batches(step: int):
        generator = torch.Generator().manual_seed(step)
        return [full_batch(torch.randint(0, 300, (2, 17), generator=generator)) for _ in range(2)]

    return batches
