"""Recurrent decoding of the hybrid: one token per step at a cost that does not grow with the lightning layers' context.

The decoder is plain torch over the parameters of the training model. A lightning layer keeps one float32 matrix per
head (MiniMax-01, arXiv 2501.08313 §2.2), whatever the length; a softmax layer keeps its keys and values. Router and
head compute in float32, as in training, so that rollout and training probabilities agree (MiniMax-M1 report §3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import lightning_attention, lightning_decode
from m1.model.hybrid import HybridModel

#: Up to this many times the chosen experts, computing all of them in two products beats sorting tokens by expert.
_DENSE_EXPERTS = 2


@dataclass
class Cache:
    """What the model remembers of each row of a batch.

    Attributes:
        states: per lightning layer, float32 (batch, heads, head_dim, head_dim).
        keys, values: per softmax layer, (batch, groups, capacity, head_dim); row b is filled up to lengths[b].
        lengths: int64 (batch,), tokens seen by each row.
        longest: an upper bound of lengths.
    """

    states: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    longest: int

    @torch.inference_mode()
    def select(self, rows: Tensor) -> Cache:
        """A copy of the given rows (int64), in that order; a row may be named several times."""
        lengths = self.lengths[rows]
        return Cache(
            states=[x[rows] for x in self.states],
            keys=[x[rows] for x in self.keys],
            values=[x[rows] for x in self.values],
            lengths=lengths,
            longest=int(lengths.max()),
        )

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> list[int]:
        """Drop all rows but these (rising, at least one), in place, at a cost that grows with the dropped rows alone.

        The last rows move into the gaps; returns which old row is now at each place.
        """
        count, kept = len(rows), set(rows)
        gaps = [i for i in range(count) if i not in kept]
        moved = [i for i in rows if i >= count]
        order = list(range(count))
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        for part in (self.states, self.keys, self.values):
            for i, x in enumerate(part):
                x[gaps] = x[moved]
                part[i] = x[:count]
        self.lengths = self.lengths[torch.tensor(order, device=self.lengths.device)]
        self.longest = int(self.lengths.max())
        return order

    @torch.inference_mode()
    def append(self, other: Cache) -> Cache:
        """The rows of this cache followed by those of `other`."""
        capacity = max((x.shape[2] for x in (*self.keys, *other.keys)), default=0)
        for cache in (self, other):
            cache.reserve(capacity)
        return Cache(
            states=[torch.cat(pair) for pair in zip(self.states, other.states, strict=True)],
            keys=[torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True)],
            values=[torch.cat(pair) for pair in zip(self.values, other.values, strict=True)],
            lengths=torch.cat((self.lengths, other.lengths)),
            longest=max(self.longest, other.longest),
        )

    def reserve(self, capacity: int) -> None:
        """Make room for rows of `capacity` tokens."""
        for part in (self.keys, self.values):
            for i, x in enumerate(part):
                if x.shape[2] < capacity:
                    part[i] = F.pad(x, (0, 0, 0, capacity - x.shape[2]))


@dataclass
class _Layer:
    """Weights of one layer.

    Attributes:
        attention: query, key and value (and the gate of a lightning layer) in one matrix.
        gate_up: (2, experts x width, hidden); down: (experts, width, hidden).
        norm, slopes: of a lightning layer alone.
    """

    softmax: bool
    input_norm: Tensor
    attention: Tensor
    attention_out: Tensor
    moe_norm: Tensor
    router: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor | None = None
    slopes: Tensor | None = None


@dataclass
class _Weights:
    """All weights as the decoder uses them: fused where that saves time, otherwise the parameters themselves."""

    embedding: Tensor
    final_norm: Tensor
    head: Tensor
    layers: list[_Layer] = field(default_factory=list)


class Decoder:
    """Prefill and step over the weights of a training model.

    The weights are read at every `prefill` (small matrices are fused then); steps use what the last prefill, or
    `refresh`, has read.

    Raises:
        ValueError: the model is split over ranks (tensor, pipeline, context or expert parallel).
    """

    def __init__(self, model: HybridModel) -> None:
        config = model.config
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        ):
            size = getattr(config, name)
            if size != 1:
                raise ValueError(f"the decoder needs the whole model on one rank, but {name} is {size}: set it to 1")
        self.model = model
        self.settings = model.settings
        self.alpha = self.settings.deepnorm_alpha
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's present weights and rotary base."""
        model = self.model
        self._inv_freq = model.rotary_pos_emb.inv_freq
        self._weights = _Weights(
            embedding=model.embedding.word_embeddings.weight.detach(),
            final_norm=model.decoder.final_layernorm.weight.detach(),
            head=model.output_layer.weight.detach().float(),
            layers=[
                _read_layer(layer, self.settings.is_softmax_layer(i)) for i, layer in enumerate(model.decoder.layers)
            ],
        )

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int = 0) -> tuple[Cache, Tensor]:
        """Read prompts.

        Padding costs nothing and changes nothing: rows are packed end to end, and only the softmax layers unpack them.

        Args:
            tokens: int64 (batch, sequence), right-padded.
            lengths: int64 (batch,), tokens of each row, at least 1.
            capacity: tokens per row to make room for, generated ones included; grows by itself when too small.

        Returns:
            The cache and the float32 logits (batch, vocabulary) after the last token of every row.
        """
        self.refresh()
        if tokens.shape[0] != len(lengths) or int(lengths.min()) < 1 or int(lengths.max()) > tokens.shape[1]:
            raise ValueError(f"lengths must lie in 1..{tokens.shape[1]}, one per row of {tuple(tokens.shape)} tokens")
        batch, longest = len(lengths), int(lengths.max())
        real = torch.arange(longest, device=tokens.device) < lengths[:, None]
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        cache = Cache([], [], [], lengths.clone(), longest)
        cos, sin = self._rotary(torch.arange(longest, device=tokens.device))

        def lightning(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            mixed, state = lightning_attention(q, k, v, slopes, cu_seqlens=offsets, output_final_state=True)
            cache.states.append(state)
            return mixed[0].transpose(0, 1)

        def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            padded = []
            for x in (q, k, v):
                rows = x.new_zeros(batch, longest, *x.shape[1:])
                rows[real] = x
                padded.append(rows.transpose(1, 2))
            q, k, v = _rotate(padded[0], cos, sin), _rotate(padded[1], cos, sin), padded[2]
            room = (0, 0, 0, max(capacity, longest) - longest)
            cache.keys.append(F.pad(k, room))
            cache.values.append(F.pad(v, room))
            share = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
            # Right padding follows every real token of its row, so the causal mask hides it.
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)[real]

        x = self._weights.embedding[tokens[:, :longest][real]]
        for layer in self._weights.layers:
            x = self._layer(x, layer, lightning, softmax)
        return cache, self._logits(x[offsets[1:] - 1])

    @torch.inference_mode()
    def step(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Append one token to every row of the cache, in place.

        Args:
            tokens: int64 (batch,).

        Returns:
            float32 logits (batch, vocabulary) of the next token.
        """
        if cache.keys and cache.longest + 1 > cache.keys[0].shape[2]:
            cache.reserve(max(16, 2 * cache.longest))
        position = cache.lengths
        cos, sin = self._rotary(position)
        cos, sin = cos[:, None], sin[:, None]
        used = cache.longest + 1
        rows = torch.arange(len(tokens), device=tokens.device)
        # Added to the scores: (batch, 1, 1, used), minus infinity behind the end of a row.
        hidden = torch.arange(used, device=tokens.device) > position[:, None]
        mask = torch.zeros(hidden.shape, device=tokens.device).masked_fill_(hidden, -torch.inf)[:, None, None]
        states, keys, values = iter(range(len(cache.states))), iter(cache.keys), iter(cache.values)

        def lightning(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
            i = next(states)
            mixed, cache.states[i] = lightning_decode(q, k, v, slopes, cache.states[i])
            return mixed

        def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            all_keys, all_values = next(keys), next(values)
            all_keys[rows, :, position] = _rotate(k, cos, sin)
            all_values[rows, :, position] = v
            grouped = _rotate(q, cos, sin).view(len(rows), k.shape[1], -1, q.shape[-1])
            scores = (grouped @ all_keys[:, :, :used].transpose(2, 3)).float() * q.shape[-1] ** -0.5
            weights = torch.softmax(scores.add_(mask), dim=-1).type_as(v)
            return (weights @ all_values[:, :, :used]).view_as(q)

        x = self._weights.embedding[tokens]
        for layer in self._weights.layers:
            x = self._layer(x, layer, lightning, softmax)
        cache.lengths = position + 1
        cache.longest += 1
        return self._logits(x)

    def _layer(
        self, x: Tensor, layer: _Layer, lightning: Callable[..., Tensor], softmax: Callable[..., Tensor]
    ) -> Tensor:
        """One layer on (tokens, hidden); `lightning` and `softmax` mix tokens, given (tokens, heads, head_dim)."""
        settings = self.settings
        eps, dim = settings.norm_epsilon, settings.head_dim
        y = _norm(x, layer.input_norm, eps)
        projected = F.linear(y, layer.attention)
        if layer.softmax:
            groups = settings.num_query_groups
            share = settings.num_attention_heads // groups
            qkv = projected.view(len(x), groups, share + 2, dim)
            q = qkv[:, :, :share].reshape(len(x), -1, dim)
            mixed = softmax(q, qkv[:, :, share], qkv[:, :, share + 1]).reshape(len(x), -1)
        else:
            assert layer.norm is not None
            heads = settings.num_attention_heads
            qkv = F.silu(projected[:, : 3 * heads * dim]).view(len(x), heads, 3 * dim)
            mixed = lightning(*qkv.split(dim, dim=-1), layer.slopes).reshape(len(x), -1)
            mixed = _norm(mixed, layer.norm, settings.lightning_norm_epsilon)
            mixed = torch.sigmoid(projected[:, 3 * heads * dim :]).mul_(mixed)
        z = _norm(torch.addmm(y, mixed, layer.attention_out.t(), beta=self.alpha), layer.moe_norm, eps)
        return self._experts(z, layer)

    def _experts(self, z: Tensor, layer: _Layer) -> Tensor:
        """alpha z + MoE(z) on (tokens, hidden): softmax over the top-k router logits, SwiGLU experts, none dropped."""
        settings = self.settings
        count, width = settings.num_experts, settings.moe_ffn_hidden_size
        top, chosen = (z.float() @ layer.router.t()).topk(settings.moe_router_topk, dim=-1)
        weight = torch.softmax(top, dim=-1)
        if count <= _DENSE_EXPERTS * settings.moe_router_topk:
            probability = torch.zeros(len(z), count, device=z.device).scatter_(1, chosen, weight).type_as(z)
            gate, up = F.linear(z, layer.gate_up.flatten(0, 1)).chunk(2, dim=-1)
            inner = F.silu(gate).mul_(up).view(len(z), count, width).mul_(probability[:, :, None])
            return torch.addmm(z, inner.flatten(1), layer.down.flatten(0, 1), beta=self.alpha)
        out = self.alpha * z
        order = chosen.flatten().argsort(stable=True)
        weight = weight.flatten()[order].type_as(z)
        token = order // settings.moe_router_topk
        counts = torch.bincount(chosen.flatten(), minlength=count).tolist()
        for expert, (rows, scale) in enumerate(zip(token.split(counts), weight.split(counts), strict=True)):
            if len(rows):
                x = z[rows]
                gate, up = F.linear(x, layer.gate_up[:, expert * width : (expert + 1) * width].flatten(0, 1)).chunk(
                    2, -1
                )
                inner = F.silu(gate).mul_(up).mul_(scale[:, None])
                out.index_add_(0, rows, inner @ layer.down[expert])
        return out

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(_norm(x, self._weights.final_norm, self.settings.norm_epsilon).float(), self._weights.head)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (positions, rotary dims) at absolute positions."""
        angles = positions[:, None].to(self._inv_freq.dtype) * self._inv_freq.to(positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        dtype = self._weights.embedding.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _read_layer(layer: Any, softmax: bool) -> _Layer:
    """Weights of a Megatron layer."""
    attention, experts = layer.self_attention, layer.mlp.experts.local_experts
    gates, ups = zip(*(expert.linear_fc1.weight.detach().chunk(2) for expert in experts), strict=True)
    common = dict(
        softmax=softmax,
        input_norm=layer.input_layernorm.weight.detach(),
        moe_norm=layer.pre_mlp_layernorm.weight.detach(),
        router=layer.mlp.router.weight.detach().float(),
        gate_up=torch.stack((torch.cat(gates), torch.cat(ups))),  # (2, experts x width, hidden)
        down=torch.stack([expert.linear_fc2.weight.detach().t() for expert in experts]),  # (experts, width, hidden)
    )
    if softmax:
        return _Layer(
            attention=attention.linear_qkv.weight.detach(),
            attention_out=attention.linear_proj.weight.detach(),
            **common,
        )
    return _Layer(
        attention=torch.cat((attention.qkv_proj.weight.detach(), attention.output_gate.weight.detach())),
        attention_out=attention.out_proj.weight.detach(),
        norm=attention.norm.weight.detach(),
        slopes=attention.slopes,
        **common,
    )


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).type_as(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first channels of x (..., head_dim); cos and sin have as many channels as are rotated."""
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)
