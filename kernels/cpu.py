"""The ``cpu`` backend: the compiled kernel for float32 and bfloat16, plain torch operations for the rest."""

from array import array

import torch
from torch import Tensor

from kernels import blockwise, build

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Output like q and final states (batch or sequences, heads, head_dim, head_dim)."""
    library = build.load() if q.dtype in NATIVE_DTYPES else None
    if library is None:
        return blockwise.forward(q, k, v, slopes, initial_state, offsets)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty_like(q)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    rows = q.shape[0] if offsets is None else len(offsets) - 1
    states = q.new_empty((rows, q.shape[1], q.shape[3], q.shape[3]), dtype=torch.float32)
    _alive, call = _call(q, slopes, initial_state, states, offsets, (q, k, v, out))
    library.lightning_forward(call.buffer_info()[0])
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
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial states; nothing but the inputs is kept from the forward pass.

    Args:
        into: where those of q, k and v are written; new tensors by default.
    """
    library = build.load() if q.dtype in NATIVE_DTYPES else None
    if library is None:
        dq, dk, dv, dstate = blockwise.backward(q, k, v, slopes, initial_state, offsets, grad_out, grad_final_state)
        if into is not None:
            dq, dk, dv = into[0].copy_(dq), into[1].copy_(dk), into[2].copy_(dv)
        return dq, dk, dv, dstate
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    grads = into or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if grad_final_state is None:
        rows = q.shape[0] if offsets is None else len(offsets) - 1
        grad_states = q.new_zeros((rows, q.shape[1], q.shape[3], q.shape[3]), dtype=torch.float32)
    else:
        grad_states = grad_final_state.clone(memory_format=torch.contiguous_format)
    _alive, call = _call(q, slopes, initial_state, grad_states, offsets, (q, k, v, grad_out, *grads))
    library.lightning_backward(call.buffer_info()[0])
    return *grads, grad_states


def decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
    """One token, or None where the compiled kernel does not apply."""
    library = build.load() if q.dtype in NATIVE_DTYPES else None
    if library is None:
        return None
    q, k, v, state = _rows(q), _rows(k), _rows(v), state.contiguous()
    out, new_state = torch.empty_like(q), torch.empty_like(state)
    rates = array("d", slopes.tolist())
    call = array("q", (q.dtype == torch.bfloat16, torch.get_num_threads(), *q.shape))
    call.extend((rates.buffer_info()[0], state.data_ptr(), new_state.data_ptr()))
    for x in (q, k, v, out):
        call.extend((x.data_ptr(), x.stride(0), x.stride(1), 0))
    library.lightning_decode(call.buffer_info()[0])
    return out, new_state


def _rows(x: Tensor) -> Tensor:
    """The kernel reads whole rows of head_dim; every other stride is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _call(
    q: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    states: Tensor,
    offsets: list[int] | None,
    tensors: tuple[Tensor, ...],
) -> tuple[object, array]:
    """The structure ``Call`` of the C++ source, and what must stay alive during the call."""
    rates = array("d", slopes.tolist())
    bounds = array("q", offsets or ())
    call = array("q", (q.dtype == torch.bfloat16, torch.get_num_threads(), *q.shape[1:], states.shape[0]))
    call.append(bounds.buffer_info()[0] if offsets else 0)
    call.append(rates.buffer_info()[0])
    call.append(0 if initial_state is None else initial_state.data_ptr())
    call.append(states.data_ptr())
    for x in tensors:
        call.extend((x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)))
    call.extend([0] * (4 * (7 - len(tensors))))
    return (rates, bounds), call
