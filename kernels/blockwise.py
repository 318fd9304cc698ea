"""Lightning attention in plain torch operations, linear in length: the ``torch`` backend.

Works on any device and dtype; it is also what the ``cpu`` backend uses where its compiled form is missing.
Block form of MiniMax-01 (arXiv 2501.08313 §2.2): tokens are cut into blocks of BLOCK; inside a block the masked
quadratic form is used, between blocks a (head_dim x head_dim) state. SEGMENT tokens at a time are handled as one
batch of blocks, so that extra memory does not grow with length.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from kernels.checks import state_dtype

BLOCK = 64
SEGMENT = 2048


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Output like q and final states (batch or sequences, heads, head_dim, head_dim)."""
    out = torch.empty_like(q)
    states = _new_states(q, initial_state, offsets)
    for i, start, end in _sequences(q, offsets):
        state = states[i]
        for a, b in _segments(start, end):
            block = _Segment(slopes, b - a, state)
            qs, ks, vs = (block.split(x[:, :, a:b]) for x in (q, k, v))
            before, after = block.scan(block.key_value(ks, vs), state)
            scores = (qs @ ks.mT).mul_(block.mask)
            o = (scores @ vs).add_((qs * block.from_start) @ before)
            out[:, :, a:b] = o.flatten(2, 3)
            state = after
        states[i] = state
    return out, states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    offsets: list[int] | None,
    grad_out: Tensor,
    grad_final_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial states; states inside a sequence are computed again."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    states = _new_states(q, initial_state, offsets)
    grad_states = _new_states(q, grad_final_state, offsets)
    for i, start, end in _sequences(q, offsets):
        segments = list(_segments(start, end))
        segment_states = [states[i]]
        for a, b in segments[:-1]:
            block = _Segment(slopes, b - a, states[i])
            _, after = block.scan(
                block.key_value(block.split(k[:, :, a:b]), block.split(v[:, :, a:b])),
                segment_states[-1],
            )
            segment_states.append(after)
        grad_state = grad_states[i]
        for (a, b), state in zip(reversed(segments), reversed(segment_states)):
            block = _Segment(slopes, b - a, state)
            qs, ks, vs, gs = (block.split(x[:, :, a:b]) for x in (q, k, v, grad_out))
            before, _ = block.scan(block.key_value(ks, vs), state)
            # The gradient of the state runs backwards through the same recurrence, fed by q^T grad_out.
            grad_after, grad_state = block.scan_back((qs * block.from_start).mT @ gs, grad_state)
            scores = (qs @ ks.mT).mul_(block.mask)
            grad_scores = (gs @ vs.mT).mul_(block.mask)
            dq[:, :, a:b] = (grad_scores @ ks).add_((gs * block.from_start) @ before.mT).flatten(2, 3)
            dk[:, :, a:b] = (grad_scores.mT @ qs).add_((vs * block.to_end) @ grad_after.mT).flatten(2, 3)
            dv[:, :, a:b] = (scores.mT @ gs).add_((ks * block.to_end) @ grad_after).flatten(2, 3)
        grad_states[i] = grad_state
    return dq, dk, dv, grad_states


def _new_states(q: Tensor, given: Tensor | None, offsets: list[int] | None) -> Tensor:
    """A writable copy of the given states, or zeros, as (sequences, batch of each, heads, d, d)."""
    _, heads, _, dim = q.shape
    if given is None:
        rows = q.shape[0] if offsets is None else len(offsets) - 1
        return q.new_zeros(rows, heads, dim, dim, dtype=state_dtype(q.dtype))
    return given.clone(memory_format=torch.contiguous_format)


def _sequences(q: Tensor, offsets: list[int] | None) -> Iterator[tuple[slice, int, int]]:
    """(rows of the state tensor, first token, end) of every sequence; unpacked rows are one batch."""
    if offsets is None:
        yield slice(None), 0, q.shape[2]
    else:
        for i, (start, end) in enumerate(pairwise(offsets)):
            yield slice(i, i + 1), start, end


def _segments(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) into pieces that are whole numbers of blocks, and a last piece below one block."""
    whole = start + (end - start) // BLOCK * BLOCK
    for a in range(start, whole, SEGMENT):
        yield a, min(a + SEGMENT, whole)
    if whole < end:
        yield whole, end


class _Segment:
    """Decay factors of a run of equal blocks and the recurrence over their states.

    All powers of the decay have exponents >= 0, so strong decay underflows to zero and never overflows.
    """

    def __init__(self, slopes: Tensor, tokens: int, like: Tensor):
        self.size = min(tokens, BLOCK)
        self.blocks = tokens // self.size
        self.slopes = slopes.to(like.dtype).view(-1, 1, 1, 1)
        self.dtype = like.dtype
        i = torch.arange(self.size, dtype=like.dtype, device=like.device)
        exponent = self.slopes[..., 0] * self.size
        weak = exponent < 0.5
        self.keep = weak.to(self.dtype)
        self.factor = torch.where(weak, torch.expm1(-exponent), torch.exp(-exponent))
        self.mask = self._lower_triangular_decay(i)
        self.from_start = torch.exp(-self.slopes * (i + 1)[:, None])
        self.to_end = torch.exp(-self.slopes * (self.size - 1 - i)[:, None])

    def _lower_triangular_decay(self, position: Tensor) -> Tensor:
        distance = position[:, None] - position[None, :]
        return torch.exp(-self.slopes * distance.clamp(min=0)).masked_fill_(distance < 0, 0.0)

    def split(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, d) to (batch, heads, blocks, block, d) in the state dtype."""
        return x.to(self.dtype).unflatten(2, (self.blocks, self.size))

    def key_value(self, ks: Tensor, vs: Tensor) -> Tensor:
        """What every block adds to the state, seen from its end: (batch, heads, blocks, d, d)."""
        return (ks * self.to_end).mT @ vs

    def decayed(self, state: Tensor) -> Tensor:
        """The state after a block that adds nothing. A decay near 1 is applied as 1 + expm1: rounded to float32,
        thousands of equal factors would drift together."""
        return torch.addcmul(state * self.keep, state, self.factor)

    def scan(self, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """States before every block, and the state after the last one."""
        before = torch.empty_like(added)
        for c in range(self.blocks):
            before[:, :, c] = state
            state = self.decayed(state) + added[:, :, c]
        return before, state

    def scan_back(self, added: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """State gradients after every block, and the gradient before the first one."""
        after = torch.empty_like(added)
        for c in reversed(range(self.blocks)):
            after[:, :, c] = grad
            grad = self.decayed(grad) + added[:, :, c]
        return after, grad
