"""The public functions: lightning attention over sequences and its one-token decode step."""

import importlib.util
import os
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import blockwise, cpu, reference
from kernels.checks import check_offsets, check_slopes, check_state, check_tokens

BACKENDS = ("reference", "torch", "cpu", "triton")


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with a constant decay per head, in time linear in the sequence length.

    ``S_t = exp(-slope) S_{t-1} + k_t v_t^T`` and ``o_t = q_t S_t``: the state includes token t, nothing is scaled
    or normalised (MiniMax-01, arXiv 2501.08313 §2.2). Differentiable once in q, k, v and initial_state; slopes
    are constants.

    Args:
        q, k, v: (batch, heads, sequence, head_dim), one dtype of float32, bfloat16, float16, float64, any strides.
        slopes: float32 (heads,), finite and >= 0; see ``lightning_slopes``.
        initial_state: state before the first token, float32 (float64 for float64 inputs), of shape
            (batch, heads, head_dim, head_dim); first state dimension belongs to k, second to v. None is zero.
        cu_seqlens: for packed input: int32 or int64 (num_sequences + 1,), 0 = c_0 < c_1 < ... = sequence. Batch
            must be 1. Tokens c_i..c_{i+1}-1 are sequence i, which starts from initial_state[i] (or zero) and ends
            in final state [i]; states then have the shape (num_sequences, heads, head_dim, head_dim). Keep it on
            the CPU: values are read on the host.
        output_final_state: also return the state after the last token (of every sequence).
        backend: None chooses by device; or one of BACKENDS.

    Returns:
        Output with the shape and dtype of q, or (output, final state in the state dtype).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or value; names the argument.
    """
    check_tokens(q, k, v, "batch, heads, sequence, head_dim")
    check_slopes(slopes, q)
    offsets = None if cu_seqlens is None else check_offsets(cu_seqlens, q, q.shape[2])
    if initial_state is not None:
        check_state(
            "initial_state",
            initial_state,
            q.shape[0] if offsets is None else len(offsets) - 1,
            q,
        )
    out, state = _LightningAttention.apply(q, k, v, slopes, initial_state, offsets, choose_backend(backend, q))
    return (out, state) if output_final_state else out


def lightning_decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token per sequence: ``new = exp(-slope) state + k v^T``, ``output = q new``.

    Args:
        q, k, v: (batch, heads, head_dim), one dtype of float32, bfloat16, float16, float64.
        slopes: float32 (heads,).
        state: float32 (batch, heads, head_dim, head_dim); left as it is.

    Returns:
        Output (batch, heads, head_dim) in the dtype of q, and the new state in the dtype of ``state``.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or value; names the argument.
    """
    check_tokens(q, k, v, "batch, heads, head_dim")
    check_slopes(slopes, q)
    check_state("state", state, q.shape[0], q)
    if q.device.type == "cpu" and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state))):
        result = cpu.decode(q, k, v, slopes, state)
        if result is not None:
            return result
    dtype = state.dtype
    # expm1: thousands of steps with a decay near 1, rounded to float32, would drift together.
    excess = torch.expm1(-slopes.to(dtype)).view(-1, 1, 1)
    keep = torch.where(excess > -0.4, 1.0, 0.0)
    factor = torch.where(excess > -0.4, excess, torch.exp(-slopes.to(dtype)).view(-1, 1, 1))
    with no_autocast(q):
        added = k.to(dtype).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)
        new_state = state * keep + torch.addcmul(added, state, factor)
        out = (q.to(dtype).unsqueeze(-2) @ new_state).squeeze(-2)
    return out.to(q.dtype), new_state


def no_autocast(q: Tensor) -> torch.autocast:
    """Inside, autocast does not lower the precision of states; inputs keep the dtype they came with."""
    return torch.autocast(q.device.type, enabled=False)


class Backend(Protocol):
    """What a backend module offers; arguments are checked before. States: (batch or sequences, heads, d, d)."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        initial_state: Tensor | None,
        offsets: list[int] | None,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        initial_state: Tensor | None,
        offsets: list[int] | None,
        grad_out: Tensor,
        grad_final_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def choose_backend(name: str | None, q: Tensor) -> Backend:
    """The backend of that name, or the fastest for the device and dtype of q. Raises ValueError if it cannot run."""
    if name is None:
        if q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= 256 and importlib.util.find_spec("triton"):
            name = "triton"
        else:
            name = "cpu" if q.device.type == "cpu" else "torch"
    if name == "torch":
        return blockwise
    if name == "reference":
        return reference
    if name == "cpu":
        if q.device.type != "cpu":
            raise ValueError(f"backend 'cpu' needs tensors on the CPU, got q on {q.device}")
        return cpu
    if name == "triton":
        return _triton(q)
    raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}")


def _triton(q: Tensor) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs tensors on a GPU (or TRITON_INTERPRET=1), got q on {q.device}")
    if q.dtype == torch.float64 or q.shape[-1] > 256:
        raise ValueError(
            "backend 'triton' takes float32, bfloat16 and float16 and head_dim up to 256, "
            f"got q {q.dtype}, {q.shape[-1]}"
        )
    from kernels import triton_backend

    return triton_backend


class _LightningAttention(torch.autograd.Function):
    """Saves the inputs alone; the backend's backward computes states again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        initial_state: Tensor | None,
        offsets: list[int] | None,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, slopes, initial_state)
        ctx.offsets, ctx.backend = offsets, backend
        ctx.set_materialize_grads(False)
        with no_autocast(q):
            return backend.forward(q, k, v, slopes, initial_state, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, initial_state = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(q)
        with no_autocast(q):
            dq, dk, dv, dstate = ctx.backend.backward(q, k, v, slopes, initial_state, ctx.offsets, grad_out, grad_state)
        return dq, dk, dv, None, dstate if initial_state is not None else None, None, None
