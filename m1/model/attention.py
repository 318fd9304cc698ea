"""The two attentions of the hybrid: lightning (linear, decayed) and softmax.

Lightning attention follows the released MiniMax-M1 layer: one projection to q, k, v with SiLU, interleaved per head;
the recurrence S_t = lambda S_{t-1} + k_t v_t^T, o_t = q_t S_t; RMSNorm over all heads; a sigmoid gate from the layer's
input; the output projection. No rotary embedding, no scaling, no biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from kernels import lightning_attention, lightning_slopes
from m1.model.norm import SplitRMSNorm


@dataclass(frozen=True)
class LightningSettings:
    """What a lightning layer needs beyond Megatron's configuration."""

    num_heads: int
    head_dim: int
    num_layers: int
    norm_epsilon: float


class LightningAttention(MegatronModule):
    """Lightning attention in the self-attention slot of a Megatron layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        settings: LightningSettings,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.settings = settings
        self.group = pg_collection.tp
        heads, width = settings.num_heads, settings.num_heads * settings.head_dim
        if heads % self.group.size():
            raise ValueError(f"{heads} lightning heads do not divide over {self.group.size()} tensor-parallel ranks")
        self.local_heads = heads // self.group.size()
        column: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=False, gather_output=False, skip_bias_add=False
        )
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, 3 * width, tp_group=self.group, **column)
        self.output_gate = ColumnParallelLinear(config.hidden_size, width, tp_group=self.group, **column)
        self.norm = SplitRMSNorm(config, width, settings.norm_epsilon, self.group)
        self.out_proj = RowParallelLinear(
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.group,
        )
        # Not a buffer: the decays stay float32 whatever the model is cast to.
        first = self.group.rank() * self.local_heads
        slopes = lightning_slopes(heads, layer_number - 1, settings.num_layers)
        self.slopes = slopes[first : first + self.local_heads].to(torch.cuda.current_device())

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """(sequence, batch, hidden) -> (sequence, batch, hidden)."""
        qkv, _bias = self.qkv_proj(hidden_states)
        sequence, batch = qkv.shape[:2]
        qkv = F.silu(qkv).view(sequence, batch, self.local_heads, 3 * self.settings.head_dim)
        q, k, v = qkv.permute(1, 2, 0, 3).split(self.settings.head_dim, dim=-1)
        mixed = lightning_attention(q, k, v, self.slopes)
        mixed = self.norm(mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1))
        gate, _bias = self.output_gate(hidden_states)
        return self.out_proj(torch.sigmoid(gate) * mixed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        norm = make_sharded_tensors_for_checkpoint(
            self.norm.state_dict(keep_vars=True), f"{prefix}norm.", {"weight": 0}, sharded_offsets,
            tp_group=self.group, dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip
        state.update(norm)
        return state


class SoftmaxCore(MegatronModule):
    """Causal grouped-query softmax attention on torch's fused kernel, in Megatron's core-attention slot."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend causally.

        Args:
            query: (sequence, batch, heads, head_dim).
            key, value: (sequence, batch, groups, head_dim).

        Returns:
            (sequence, batch, heads x head_dim).
        """
        sequence, batch = query.shape[:2]
        groups = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
