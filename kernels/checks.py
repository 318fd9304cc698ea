"""Argument checks of the kernels: every mistake is a ValueError that names the argument, before any work."""

from itertools import pairwise

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states are kept: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tokens(q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    """q, k and v agree in shape, dtype and device; ``shape`` names the dimensions, comma separated."""
    if q.dim() != shape.count(",") + 1 or 0 in q.shape:
        raise ValueError(f"q must have shape ({shape}) without an empty dimension, got {tuple(q.shape)}")
    if q.dtype not in INPUT_DTYPES:
        raise ValueError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def check_slopes(slopes: Tensor, q: Tensor) -> None:
    """One finite, non-negative float32 slope per head, on the device of q."""
    if slopes.shape != (q.shape[1],):
        raise ValueError(f"slopes must have shape (heads,) = ({q.shape[1]},), got {tuple(slopes.shape)}")
    if slopes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"slopes must be float32 (a decay rounded to 16 bits is another decay), got {slopes.dtype}")
    if slopes.device != q.device:
        raise ValueError(f"slopes must be on the device of q, {q.device}, got {slopes.device}")
    if slopes.requires_grad:
        raise ValueError("slopes must not require a gradient: the decay is a constant of the recipe; detach it")
    # Reading values back from a GPU waits for it, so there one tensor object is read once only.
    if slopes.is_cuda and getattr(slopes, "_lightning_slopes_checked", False):
        return
    values = slopes.tolist()
    if not all(0.0 <= s < float("inf") for s in values):
        raise ValueError(f"slopes must be finite and not negative (decay is exp(-slope)), got {values}")
    if slopes.is_cuda:
        slopes._lightning_slopes_checked = True  # type: ignore[attr-defined]


def check_offsets(cu_seqlens: Tensor, q: Tensor, length: int) -> list[int]:
    """The sequence boundaries of packed input as a list: 0 < ... < length, strictly increasing."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be an int32 or int64 tensor of shape (num_sequences + 1,), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens must be on the CPU or on {q.device}, got {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(f"q must have batch 1 when cu_seqlens is given (packed sequences), got {q.shape[0]}")
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at the sequence length {length}, got {offsets[0]} and {offsets[-1]}"
        )
    for i, (start, end) in enumerate(pairwise(offsets)):
        if end <= start:
            raise ValueError(
                f"cu_seqlens must increase strictly (no empty sequence), got {start}, {end} for sequence {i}"
            )
    return offsets


def check_state(name: str, state: Tensor, num_states: int, q: Tensor) -> None:
    """A state of shape (num_states, heads, head_dim, head_dim) in the state dtype of q."""
    shape = (num_states, q.shape[1], q.shape[-1], q.shape[-1])
    if state.shape != shape:
        raise ValueError(
            f"{name} must have shape (batch or sequences, heads, head_dim, head_dim) = {shape}, "
            f"got {tuple(state.shape)}"
        )
    if state.dtype != state_dtype(q.dtype):
        raise ValueError(f"{name} must be {state_dtype(q.dtype)} for {q.dtype} inputs, got {state.dtype}")
    if state.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {state.device}")
