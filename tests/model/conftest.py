"""A small hybrid, built once per module, in a process group of this process alone."""

from __future__ import annotations

import pytest
import torch

from m1.profile import Model, Parallel

SMALL = Model(
    num_layers=8, softmax_every=8, hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
    num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=40, vocab_size=320, max_position_embeddings=1024,
)  # fmt: skip
ALONE = Parallel()


@pytest.fixture(scope="module")
def hybrid():
    """The small hybrid with a RoPE base that is not the default, in evaluation mode."""
    from m1.model.hybrid import build_model
    from m1.training import parallel

    parallel.initialize(ALONE, 1)
    return build_model(SMALL, ALONE, seed=7, rotary_base=50_000.0).eval()


@pytest.fixture
def tokens():
    """Two sequences of 600 tokens: more than two blocks of transformers' lightning attention and not a multiple."""
    return torch.randint(0, SMALL.vocab_size, (2, 600), generator=torch.Generator().manual_seed(3))


def logits_of(model, tokens):
    """Logits of the Megatron hybrid, (batch, sequence, vocabulary)."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)
