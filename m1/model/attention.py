"""The two attentions of the hybrid: lightning (linear, decayed) and softmax.

Lightning attention follows the released MiniMax-M1 layer: one projection to q, k, v with SiLU, interleaved per head;
the recurrence S_t = lambda S_{t-1} + k_t v_t^T, o_t = q_t S_t; RMSNorm over all heads; a sigmoid gate from the layer's
input; the output projection. No rotary embedding, no scaling, no biases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from kernels import lightning_attention, lightning_slopes
from kernels.context_parallel import lightning_attention_context_parallel
from kernels.fused import silu_lightning
from m1.model.norm import SplitRMSNorm


@dataclass(frozen=True)
class Packing:
    """Samples packed end to end in one row; neither state nor attention crosses from one to the next.

    It takes the place of Megatron's packed_seq_params, whose paths for other kernels `qkv_format` keeps closed.

    Attributes:
        offsets: where samples begin in the whole row, whatever part of it a context-parallel rank holds, and its end.
        parents: of every sample the index of the one that it continues, whose state and keys it sees, or -1. The
            continued ones stand before all that continue any. None: no sample continues another. Not under context
            parallelism.
    """

    offsets: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    qkv_format: ClassVar[str] = "sbhd"


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
        self.group, self.context_group = pg_collection.tp, pg_collection.cp
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

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """(sequence, batch, hidden) -> (sequence, batch, hidden); a context-parallel rank holds a part in the order."""
        qkv, _bias = self.qkv_proj(hidden_states)
        sequence, batch = qkv.shape[:2]
        qkv = qkv.view(sequence, batch, self.local_heads, 3 * self.settings.head_dim)
        offsets = None if packed_seq_params is None else packed_seq_params.offsets
        if self.context_group.size() > 1:
            mixed = self._over_ranks(qkv, offsets)
        elif packed_seq_params is None or packed_seq_params.parents is None:
            mixed = silu_lightning(qkv, self.slopes, offsets)
        else:
            mixed = self._continuing(qkv, packed_seq_params.offsets, packed_seq_params.parents)
        gate, _bias = self.output_gate(hidden_states)
        return self.out_proj(self.norm(mixed.reshape(sequence, batch, -1), gate))

    def _over_ranks(self, qkv: Tensor, offsets: tuple[int, ...] | None) -> Tensor:
        """The mixing where context-parallel ranks hold parts of the sequence."""
        q, k, v = F.silu(qkv).permute(1, 2, 0, 3).split(self.settings.head_dim, dim=-1)
        bounds = None if offsets is None else torch.tensor(offsets, device="cpu")
        mixed = lightning_attention_context_parallel(q, k, v, self.slopes, group=self.context_group, cu_seqlens=bounds)
        return mixed.permute(2, 0, 1, 3)

    def _continuing(self, qkv: Tensor, offsets: tuple[int, ...], parents: tuple[int, ...]) -> Tensor:
        """The mixing where samples start from the states at the ends of others."""
        roots = next(i for i, parent in enumerate(parents) if parent >= 0)
        middle = offsets[roots]
        before, after = F.silu(qkv).permute(1, 2, 0, 3).split((middle, offsets[-1] - middle), dim=2)
        first, states = self._mix(before, offsets[: roots + 1], None)
        nothing = torch.zeros_like(states[:1])  # where the index -1 leads
        initial = torch.cat((states, nothing))[torch.tensor(parents[roots:], device=states.device)]
        rest, _ = self._mix(after, [at - middle for at in offsets[roots:]], initial)
        return torch.cat((first, rest), dim=2).permute(2, 0, 1, 3)

    def _mix(self, qkv: Tensor, offsets: Sequence[int], initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """(1, heads, tokens, 3 x head_dim) of packed samples -> their outputs and final states."""
        q, k, v = qkv.split(self.settings.head_dim, dim=-1)
        bounds = torch.tensor(offsets, device="cpu")
        return lightning_attention(
            q, k, v, self.slopes, initial_state=initial, cu_seqlens=bounds, output_final_state=True
        )

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
    """Causal grouped-query softmax attention on torch's fused kernels, in Megatron's core-attention slot.

    Under context parallelism every rank holds a contiguous part of the sequence and gathers all keys and values.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Packing | None = None, **__: Any
    ) -> Tensor:
        """Attend causally, within a sample.

        Args:
            query: (sequence, batch, heads, head_dim), this rank's part.
            key, value: (sequence, batch, groups, head_dim), this rank's part.

        Returns:
            (sequence, batch, heads x head_dim).
        """
        sequence, batch = query.shape[:2]
        first = self.context_group.rank() * sequence
        if self.context_group.size() > 1:
            both = torch.cat((key, value), dim=-1)
            key, value = gather_from_sequence_parallel_region(both, group=self.context_group).chunk(2, dim=-1)
        groups = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        offsets = (0, key.shape[0]) if packed_seq_params is None else packed_seq_params.offsets
        if packed_seq_params is not None and packed_seq_params.parents is not None:
            return _continuing(q, k, v, offsets, packed_seq_params.parents).reshape(sequence, batch, -1)
        parts = []
        for sample, start, end in _pieces(offsets, first, first + sequence):
            mine = q[:, :, start - first : end - first]
            mask = _aligned_at_the_end(q, end - start, end - sample) if start > sample else None
            attended = F.scaled_dot_product_attention(
                mine, k[:, :, sample:end], v[:, :, sample:end], mask, is_causal=mask is None
            )
            parts.append(attended)
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


def _continuing(q: Tensor, k: Tensor, v: Tensor, offsets: tuple[int, ...], parents: tuple[int, ...]) -> Tensor:
    """Causal attention where packed samples see the ones that they continue.

    Every sample becomes a row of its own, after a copy of what it continues.

    Args:
        q, k, v: (1, heads, tokens, head_dim).

    Returns:
        (tokens, heads, head_dim).
    """
    ranges = [range(*bounds) for bounds in itertools.pairwise(offsets)]
    rows = [[*(ranges[parent] if parent >= 0 else ()), *own] for parent, own in zip(parents, ranges)]
    longest = max(map(len, rows))
    source = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=q.device)
    q, k, v = (x[0].transpose(0, 1)[source].transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
    ends = [i * longest + len(row) for i, row in enumerate(rows)]
    place = [at for end, own in zip(ends, ranges) for at in range(end - len(own), end)]
    return mixed[torch.tensor(place, device=q.device)]


def _aligned_at_the_end(like: Tensor, queries: int, keys: int) -> Any:
    """Causal mask whose last query sees all keys; on a GPU only its description, which flash kernels understand."""
    if like.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # pulls in torch's compiler, seconds of a CPU's start

        return causal_lower_right(queries, keys)
    return like.new_ones((queries, keys), dtype=torch.bool).tril(keys - queries)


def _pieces(offsets: tuple[int, ...], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Samples that lie in [first, last): where each begins, and from where to where it lies there."""
    for sample, end in itertools.pairwise(offsets):
        if sample < last and end > first:
            yield sample, max(sample, first), min(end, last)
