"""The small hybrid that the tests of this folder share."""

from __future__ import annotations

import torch

from m1.config.model import Model
from m1.config.parallel import Parallel

SMALL = Model(
    num_layers=8, softmax_every=8, hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
    num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=40, vocab_size=320, max_position_embeddings=1024,
)  # fmt: skip
ALONE = Parallel()


def logits_of(model, tokens):
    """Logits of the Megatron hybrid, (batch, sequence, vocabulary)."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)
