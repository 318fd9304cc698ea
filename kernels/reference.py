"""Lightning attention in float64, written for clarity: the oracle of the tests and the ``reference`` backend.

Two forms that share no code: ``recurrent`` is the definition, token by token; ``quadratic`` is the masked matrix
form. Both are differentiable by autograd, quadratic in memory or slow, and meant for small inputs.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kernels.checks import state_dtype

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None = None,
    offsets: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(-slope) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``; float64 output and final states."""
    return _each_sequence(_recurrent, q, k, v, slopes, initial_state, offsets)


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None = None,
    offsets: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``o = (q k^T * D) v`` with ``D_ij = exp(-slope (i-j))`` for i >= j; float64 output and final states."""
    return _each_sequence(_quadratic, q, k, v, slopes, initial_state, offsets)


def _each_sequence(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor]:
    q, k, v, slopes = (x.double() for x in (q, k, v, slopes))
    batch, heads, _, dim = q.shape
    rows = batch if offsets is None else len(offsets) - 1
    state = q.new_zeros(rows, heads, dim, dim) if initial_state is None else initial_state.double()
    if offsets is None:
        return form(q, k, v, slopes, state)
    parts = [
        form(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], slopes, state[i : i + 1])
        for i, (a, b) in enumerate(pairwise(offsets))
    ]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([final for _, final in parts])


def _recurrent(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = torch.exp(-slopes)[:, None, None]
    out = []
    # unbind, not indexing: the gradient of every index would be a tensor of full length.
    for q_t, k_t, v_t in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
        state = decay * state + k_t[..., :, None] * v_t[..., None, :]
        out.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(out, dim=2), state


def _quadratic(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    t = torch.arange(length, dtype=q.dtype, device=q.device)
    distance = t[:, None] - t[None, :]
    mask = torch.exp(-slopes[:, None, None] * distance.clamp(min=0)).tril()
    since_start = torch.exp(-slopes[:, None] * (t + 1))[..., None]
    to_end = torch.exp(-slopes[:, None] * (length - 1 - t))[..., None]
    out = (q @ k.mT * mask) @ v + (q * since_start) @ state
    final = torch.exp(-slopes * length)[:, None, None] * state + (k * to_end).mT @ v
    return out, final


def forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    """The quadratic form as a backend: results in the dtypes of the other backends."""
    out, state = quadratic(q, k, v, slopes, initial_state, offsets)
    return out.to(q.dtype), state.to(state_dtype(q.dtype))


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
    """Gradients of q, k, v and the initial states, by autograd through the quadratic form."""
    rows = q.shape[0] if offsets is None else len(offsets) - 1
    if initial_state is None:
        initial_state = q.new_zeros(rows, q.shape[1], q.shape[3], q.shape[3], dtype=state_dtype(q.dtype))
    q, k, v, initial_state = (x.detach().requires_grad_() for x in (q, k, v, initial_state))
    with torch.enable_grad():
        out, state = forward(q, k, v, slopes, initial_state, offsets)
    grad_final_state = torch.zeros_like(state) if grad_final_state is None else grad_final_state
    dq, dk, dv, dstate = torch.autograd.grad((out, state), (q, k, v, initial_state), (grad_out, grad_final_state))
    return dq, dk, dv, dstate
