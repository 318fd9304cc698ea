"""The ``triton`` backend: one kernel, run once forward and three times backward.

Output and gradients are all the same decayed linear recurrence over different inputs:

    o  = scan(q, k, v;  S)          out_t = x_t (sum over s <= t of l^(t-s) y_s^T z_s)
    dq = scan(do, v, k; S^T)
    dv = scan(k, q, do; G)          the same with s >= t, from the last token to the first
    dk = scan(v, do, q; G^T)

A program owns one head, one range of tokens (a segment) and BLOCK_Z columns of the state, which stays in
registers in float32. Long sequences are cut into segments so that every multiprocessor has work: a first, output-less
run gives what each segment adds to the state, a decayed prefix over segments their initial states.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# dtype -> head_dim (rounded up to a power of two) -> (tokens per block, state columns per program, warps, stages).
TUNING = {
    torch.bfloat16: {
        16: (64, 16, 4, 2),
        32: (64, 32, 4, 2),
        64: (64, 64, 4, 2),
        128: (64, 64, 8, 2),
        256: (32, 32, 8, 2),
    },
    torch.float16: {
        16: (64, 16, 4, 2),
        32: (64, 32, 4, 2),
        64: (64, 64, 4, 2),
        128: (32, 64, 8, 2),
        256: (32, 32, 8, 1),
    },
    torch.float32: {
        16: (64, 16, 4, 1),
        32: (32, 32, 4, 1),
        64: (32, 64, 8, 1),
        128: (32, 64, 8, 1),
        256: (16, 32, 8, 1),
    },
}
MIN_SEGMENT = 1024  # tokens; below this the run over segments costs more than the parallelism brings


@triton.jit
def _scan_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    out_ptr,
    slopes_ptr,
    segments_ptr,
    initial_ptr,
    final_ptr,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    z_batch,
    z_head,
    z_token,
    out_batch,
    out_head,
    out_token,
    heads,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    WRITE_OUT: tl.constexpr,
    INPUT_DTYPE: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2).to(tl.int64)
    batch = tl.load(segments_ptr + segment * 3)
    first = tl.load(segments_ptr + segment * 3 + 1)
    length = tl.load(segments_ptr + segment * 3 + 2) - first
    slope = tl.load(slopes_ptr + head).to(tl.float32)

    i = tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    column = column_block * BLOCK_Z + tl.arange(0, BLOCK_Z)
    dim_ok = dim < DIM
    column_ok = column < DIM
    state_at = (segment * heads + head) * DIM * DIM + dim[:, None] * DIM + column[None, :]
    state_ok = dim_ok[:, None] & column_ok[None, :]
    if HAS_INITIAL:
        state = tl.load(initial_ptr + state_at, mask=state_ok, other=0.0)
    else:
        state = tl.zeros((BLOCK_DIM, BLOCK_Z), dtype=tl.float32)

    # Distances in a block; exponents of masked entries are clamped to 0, so no power overflows.
    if REVERSE:
        distance = i[None, :] - i[:, None]
    else:
        distance = i[:, None] - i[None, :]
    mask = tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0)), 0.0)

    blocks = tl.cdiv(length, BLOCK)
    for n in range(0, blocks):
        block = n
        if REVERSE:
            block = blocks - 1 - n
        start = block * BLOCK
        size = tl.minimum(length - start, BLOCK)
        row_ok = i < size
        token = first + start + i
        load_dim = row_ok[:, None] & dim_ok[None, :]
        load_column = row_ok[:, None] & column_ok[None, :]
        y_at = batch * y_batch + head * y_head + token[:, None] * y_token + dim[None, :]
        z_at = batch * z_batch + head * z_head + token[:, None] * z_token + column[None, :]
        y = tl.load(y_ptr + y_at, mask=load_dim, other=0.0)
        z = tl.load(z_ptr + z_at, mask=load_column, other=0.0)
        since_start = tl.exp(-slope * (i + 1))
        to_end = tl.exp(-slope * tl.maximum(size - 1 - i, 0))
        if WRITE_OUT:
            x_at = batch * x_batch + head * x_head + token[:, None] * x_token + dim[None, :]
            x = tl.load(x_ptr + x_at, mask=load_dim, other=0.0)
            scores = tl.dot(x.to(INPUT_DTYPE), tl.trans(y.to(INPUT_DTYPE)), input_precision=PRECISION) * mask
            scores = scores.to(SCORE_DTYPE).to(PRODUCT_DTYPE)
            out = tl.dot(scores, z.to(PRODUCT_DTYPE), input_precision=PRECISION)
            # The state enters in float32 (tf32 on tensor cores): in 16 bits a long sum would overflow or blur.
            to_state = since_start
            if REVERSE:
                to_state = to_end
            out += tl.dot(x.to(tl.float32) * to_state[:, None], state, input_precision=PRECISION)
            out_at = batch * out_batch + head * out_head + token[:, None] * out_token + column[None, :]
            tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=load_column)
        weight = to_end
        if REVERSE:
            weight = since_start
        added = (y.to(tl.float32) * weight[:, None]).to(SCORE_DTYPE).to(PRODUCT_DTYPE)
        state = state * tl.exp(-slope * size) + tl.dot(tl.trans(added), z.to(PRODUCT_DTYPE), input_precision=PRECISION)
    tl.store(final_ptr + state_at, state, mask=state_ok)


def forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Output like q and final states (batch or sequences, heads, head_dim, head_dim)."""
    return _scan(q, k, v, slopes, initial_state, offsets, reverse=False)


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
    """Gradients of q, k, v and the initial states; nothing but the inputs is kept from the forward pass."""
    state_t = None if initial_state is None else initial_state.mT
    grad_t = None if grad_final_state is None else grad_final_state.mT
    dq, _ = _scan(grad_out, v, k, slopes, state_t, offsets, reverse=False)
    dv, grad_initial = _scan(k, q, grad_out, slopes, grad_final_state, offsets, reverse=True)
    dk, _ = _scan(v, grad_out, q, slopes, grad_t, offsets, reverse=True)
    return dq, dk, dv, grad_initial


def _scan(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    offsets: list[int] | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """(scan of x, y, z, state after the scan of every sequence)."""
    x, y, z = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, y, z))
    batch, _, length, _ = x.shape
    bounds = tuple(offsets) if offsets is not None else (0, length)
    table, pieces = _segments(bounds, batch, _tokens_per_segment(x), x.device)
    sequences = batch if offsets is None else len(bounds) - 1
    if len(table) > sequences:
        _, added = _launch(x, y, z, slopes, None, table, reverse, write_out=False)
        state = _segment_states(added, state, slopes, pieces, reverse)
    out, final = _launch(x, y, z, slopes, state, table, reverse, write_out=True)
    if len(table) > sequences:
        final = torch.stack([final[rows[0] if reverse else rows[-1]] for rows, _ in pieces])
    return out, final


def _segment_states(
    added: Tensor,
    state: Tensor | None,
    slopes: Tensor,
    pieces: list[tuple[list[int], list[int]]],
    reverse: bool,
) -> Tensor:
    """State before every segment: the decayed prefix of what the segments before it add."""
    initial = torch.zeros_like(added)
    for i, (rows, lengths) in enumerate(pieces):
        order = list(zip(rows, lengths))[:: -1 if reverse else 1]
        if state is not None:
            initial[order[0][0]] = state[i]
        for (before, tokens), (row, _) in pairwise(order):
            decay = torch.exp(-slopes * tokens)[:, None, None]
            initial[row] = torch.addcmul(added[before], initial[before], decay)
    return initial


@functools.lru_cache(maxsize=64)
def _segments(
    bounds: tuple[int, ...], batch: int, tokens: int, device: torch.device
) -> tuple[Tensor, list[tuple[list[int], list[int]]]]:
    """Segment table (segments, [batch, first, end]) on the device; rows and lengths of each sequence's segments."""
    table: list[tuple[int, int, int]] = []
    pieces = []
    for b in range(batch):
        for start, end in pairwise(bounds):
            cuts = [*range(start, end, tokens), end]
            pieces.append((list(range(len(table), len(table) + len(cuts) - 1)), [d - c for c, d in pairwise(cuts)]))
            table.extend((b, c, d) for c, d in pairwise(cuts))
    return torch.tensor(table, dtype=torch.int64, device=device), pieces


def _tokens_per_segment(x: Tensor) -> int:
    """Whole blocks, so many that two programs per multiprocessor exist, but at least MIN_SEGMENT."""
    batch, heads, length, dim = x.shape
    block, block_z, _, _ = TUNING[x.dtype][_padded(dim)]
    programs = batch * heads * triton.cdiv(dim, block_z)
    wanted = max(1, 2 * _multiprocessors(x.device) // programs)
    return max(MIN_SEGMENT, triton.cdiv(triton.cdiv(length, wanted), block) * block)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _launch(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    slopes: Tensor,
    initial: Tensor | None,
    table: Tensor,
    reverse: bool,
    write_out: bool,
) -> tuple[Tensor, Tensor]:
    heads, dim = x.shape[1], x.shape[3]
    _, block_z, warps, stages = TUNING[x.dtype][_padded(dim)]
    # Its layout follows x's; a state-only run passes x for a pointer that is never written.
    out = torch.empty_like(x) if write_out else x
    final = torch.empty(len(table), heads, dim, dim, dtype=torch.float32, device=x.device)
    initial = None if initial is None else initial.contiguous()
    grid = (triton.cdiv(dim, block_z), heads, len(table))
    constants = _constants(x.dtype, dim, interpreted=not x.is_cuda)
    _scan_kernel[grid](
        x,
        y,
        z,
        out,
        slopes,
        table,
        final if initial is None else initial,
        final,
        *x.stride()[:3],
        *y.stride()[:3],
        *z.stride()[:3],
        *out.stride()[:3],
        heads,
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        WRITE_OUT=write_out,
        **constants,
        num_warps=warps,
        num_stages=stages,
    )
    return out, final


def _constants(dtype: torch.dtype, dim: int, interpreted: bool) -> dict[str, Any]:
    """Compile-time constants that follow from the inputs' dtype and width."""
    block, block_z, _, _ = TUNING[dtype][_padded(dim)]
    # Scores may leave float16's range; bfloat16 has that of float32.
    score_dtype = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    inputs = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "DIM": dim,
        "BLOCK_DIM": _padded(dim),
        "BLOCK": block,
        "BLOCK_Z": block_z,
        # The interpreter multiplies bfloat16 wrongly (it sees integers): there, rounded values in float32 are used.
        "INPUT_DTYPE": tl.float32 if interpreted else inputs,
        "SCORE_DTYPE": score_dtype,
        "PRODUCT_DTYPE": tl.float32 if interpreted else score_dtype,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
