"""The hybrid's sizes."""

from __future__ import annotations

from pydantic import Field, model_validator

from m1.config.base import Section


class Model(Section):
    """The hybrid of lightning and softmax attention (MiniMax-01, arXiv 2501.08313 §2)."""

    num_layers: int = Field(ge=1)
    softmax_every: int = Field(8, ge=1, description="every n-th layer has softmax attention, the others lightning")
    hidden_size: int = Field(ge=8)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int = Field(ge=1, description="key/value heads of the softmax layers")
    head_dim: int = Field(ge=4)
    num_experts: int = Field(ge=2)
    moe_router_topk: int = Field(2, ge=2, description="the chosen experts' probabilities are renormalised")
    moe_ffn_hidden_size: int = Field(ge=8)
    vocab_size: int = Field(ge=300)
    rotary_percent: float = Field(0.5, gt=0, le=1)
    rotary_base: float = Field(10_000.0, gt=1)
    norm_epsilon: float = Field(1e-5, gt=0)
    lightning_norm_epsilon: float = Field(1e-6, gt=0)
    max_position_embeddings: int = Field(ge=16)
    init_beta: float | None = Field(None, gt=0, description="initialisation scale; by default DeepNorm's (8N)^(-1/4)")

    @property
    def deepnorm_alpha(self) -> float:
        """Residual factor (2N)^(1/4) of DeepNorm for N layers."""
        return (2 * self.num_layers) ** 0.25

    @property
    def deepnorm_beta(self) -> float:
        """Scale of values, outputs and experts at initialisation; not a factor of the forward pass."""
        return self.init_beta or (8 * self.num_layers) ** -0.25

    def is_softmax_layer(self, layer_index: int) -> bool:
        """Whether the layer with this 0-based index has softmax attention."""
        return (layer_index + 1) % self.softmax_every == 0

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.moe_router_topk > self.num_experts:
            raise ValueError(f"moe_router_topk={self.moe_router_topk} exceeds num_experts={self.num_experts}")
        if int(self.head_dim * self.rotary_percent) % 2:
            raise ValueError(f"rotary_percent={self.rotary_percent} of head_dim={self.head_dim} is not an even number")
        return self
