"""Lightning attention over a sequence that is split across the ranks of a context-parallel group.

Every rank computes what its own tokens add to the state, one all-gather shares these (head_dim x head_dim) states -
never tokens - and each rank sums those of the chunks before it with the decay of the distance between: with a constant
decay the prefix is a closed form, so ranks do not wait for one another (the prefix sum of LASP+, MiniMax-01,
arXiv 2501.08313 §3, with decay weights). The backward pass does the same with state gradients, from behind.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention import Backend, choose_backend, no_autocast
from kernels.checks import check_offsets, check_slopes, check_tokens, state_dtype

LAYOUTS = ("contiguous", "zigzag")


def lightning_attention_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    group: dist.ProcessGroup | None,
    layout: str = "contiguous",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``lightning_attention`` of the whole sequence, on this rank's part of it.

    Args:
        q, k, v: this rank's tokens (batch, heads, sequence / group size, head_dim), equally many on every rank.
        slopes: float32 (heads,), of these heads.
        group: the context-parallel process group (None: the default group).
        layout: which tokens a rank of N holds. ``contiguous``: the rank-th of N equal chunks. ``zigzag``: of 2N equal
            chunks, number rank followed by number 2N-1-rank, as Megatron-core's softmax attention splits them.
        cu_seqlens: boundaries of packed sequences in the *whole* sequence, the same on every rank; batch must be 1.
        backend: as in ``lightning_attention``.

    Returns:
        Output for this rank's tokens, with the shape and dtype of q. Each pass sends one message per rank of
        chunks x batch x heads x head_dim^2 x 4 bytes, whatever the sequence length.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or value; names the argument.
    """
    check_tokens(q, k, v, "batch, heads, sequence, head_dim")
    check_slopes(slopes, q)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "zigzag" and q.shape[2] % 2:
        raise ValueError(f"q must have an even sequence length per rank for the zigzag layout, got {q.shape[2]}")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    whole = None if cu_seqlens is None else check_offsets(cu_seqlens, q, q.shape[2] * size)
    plan = _Plan(size, rank, layout, q.shape[2], whole)
    return _ContextParallelAttention.apply(q, k, v, slopes, group, plan, choose_backend(backend, q))


@dataclass(frozen=True)
class _Plan:
    """Which chunks of the whole sequence this rank holds, and where packed sequences begin in them."""

    size: int
    rank: int
    layout: str
    local_tokens: int
    offsets: list[int] | None

    @property
    def owners(self) -> list[list[int]]:
        """Chunk numbers of every rank, in the order in which a rank stores them."""
        if self.layout == "contiguous":
            return [[r] for r in range(self.size)]
        return [[r, 2 * self.size - 1 - r] for r in range(self.size)]

    @property
    def chunk_tokens(self) -> int:
        return self.local_tokens // len(self.owners[0])

    def span(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens

    def sequence_start(self, token: int) -> int:
        """First token of the packed sequence that ``token`` belongs to."""
        return 0 if self.offsets is None else max(x for x in self.offsets if x <= token)

    def local_offsets(self, chunk: int) -> list[int] | None:
        """Boundaries of the pieces of packed sequences in a chunk, from its first token."""
        if self.offsets is None:
            return None
        start, end = self.span(chunk)
        return [0, *(x - start for x in self.offsets if start < x < end), end - start]

    def weights(self, slopes: Tensor) -> Tensor:
        """(heads, chunk, earlier chunk): how a chunk's state counts at the start of a later one, or zero."""
        chunks = sum(len(own) for own in self.owners)
        distance = torch.full((chunks, chunks), float("inf"), dtype=slopes.dtype)
        for later in range(chunks):
            start, _ = self.span(later)
            for earlier in range(later):
                _, end = self.span(earlier)
                if self.sequence_start(start) < end:
                    distance[later, earlier] = start - end
        distance = distance.to(slopes.device)
        decay = torch.exp(-slopes[:, None, None] * distance.nan_to_num(posinf=0.0))
        return decay.masked_fill_(distance.isinf(), 0.0)


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        group: dist.ProcessGroup | None,
        plan: _Plan,
        backend: Backend,
    ) -> Tensor:
        with no_autocast(q):
            out, prefixes = _forward(q, k, v, slopes, group, plan, backend)
        ctx.save_for_backward(q, k, v, slopes, prefixes)
        ctx.group, ctx.plan, ctx.backend = group, plan, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, prefixes = ctx.saved_tensors
        with no_autocast(q):
            grads = _backward(q, k, v, slopes, prefixes, grad_out, ctx.group, ctx.plan, ctx.backend)
        return *grads, None, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, group: dist.ProcessGroup | None, plan: _Plan, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Local output, and the states before this rank's chunks."""
    own = plan.owners[plan.rank]
    added = []
    for part, chunk in enumerate(own):
        # Only the last packed piece of a chunk reaches the chunks after it.
        start = (plan.local_offsets(chunk) or [0, 0])[-2]
        ks, vs = (_part(x, plan, part)[:, :, start:] for x in (k, v))
        to_end = torch.arange(ks.shape[2] - 1, -1, -1, dtype=slopes.dtype, device=q.device)
        added.append(_weighted_outer(ks, vs, torch.exp(-slopes[:, None] * to_end)))
    states = _gather(torch.stack(added), group, plan)
    prefixes = torch.einsum("hce,ebhij->cbhij", plan.weights(slopes).to(states.dtype), states)[own]

    out = torch.empty_like(q)
    for part, chunk in enumerate(own):
        offsets = plan.local_offsets(chunk)
        qs, ks, vs = (_part(x, plan, part) for x in (q, k, v))
        found, _ = backend.forward(qs, ks, vs, slopes, _first_row(prefixes[part], offsets), offsets)
        _part(out, plan, part).copy_(found)
    return out, prefixes


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    prefixes: Tensor,
    grad_out: Tensor,
    group: dist.ProcessGroup | None,
    plan: _Plan,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Local gradients of q, k and v."""
    own = plan.owners[plan.rank]
    wanted = []
    for part, chunk in enumerate(own):
        # Only the first packed piece of a chunk reads the state from before it.
        end = (plan.local_offsets(chunk) or [0, plan.chunk_tokens])[1]
        qs, gs = (_part(x, plan, part)[:, :, :end] for x in (q, grad_out))
        since_start = torch.arange(1, end + 1, dtype=slopes.dtype, device=q.device)
        wanted.append(_weighted_outer(qs, gs, torch.exp(-slopes[:, None] * since_start)))
    grads = _gather(torch.stack(wanted), group, plan)
    suffixes = torch.einsum("hce,cbhij->ebhij", plan.weights(slopes).to(grads.dtype), grads)[own]

    results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for part, chunk in enumerate(own):
        offsets = plan.local_offsets(chunk)
        qs, ks, vs, gs = (_part(x, plan, part) for x in (q, k, v, grad_out))
        initial, final = _first_row(prefixes[part], offsets), _last_row(suffixes[part], offsets)
        found = backend.backward(qs, ks, vs, slopes, initial, offsets, gs, final)
        for result, value in zip(results, found):
            _part(result, plan, part).copy_(value)
    return results


def _part(x: Tensor, plan: _Plan, part: int) -> Tensor:
    """The part-th chunk of a local tensor, as a view."""
    return x[:, :, part * plan.chunk_tokens : (part + 1) * plan.chunk_tokens]


def _weighted_outer(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """sum over tokens of weight_t x_t^T y_t: (batch, heads, head_dim, head_dim) in the state dtype."""
    dtype = state_dtype(x.dtype)
    return (x.to(dtype) * weight.to(dtype)[..., None]).mT @ y.to(dtype)


def _gather(states: Tensor, group: dist.ProcessGroup | None, plan: _Plan) -> Tensor:
    """States of every rank's chunks, in the order of the sequence: (chunks, batch, heads, d, d)."""
    gathered = states.new_empty(plan.size * states.shape[0], *states.shape[1:])
    dist.all_gather_into_tensor(gathered, states, group=group)
    order = torch.tensor([chunk for own in plan.owners for chunk in own], device=states.device)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def _first_row(state: Tensor, offsets: list[int] | None) -> Tensor:
    """The state of the first packed piece; the others start from zero."""
    if offsets is None:
        return state
    return torch.cat([state, state.new_zeros(len(offsets) - 2, *state.shape[1:])])


def _last_row(state: Tensor, offsets: list[int] | None) -> Tensor:
    if offsets is None:
        return state
    return torch.cat([state.new_zeros(len(offsets) - 2, *state.shape[1:]), state])
