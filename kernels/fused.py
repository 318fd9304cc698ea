"""The parts of a layer between its matrix products, each in one pass over memory on a CPU.

RMSNorm (with the residual that is added before it, or the gate that is multiplied after it), SwiGLU with the router's
weight, SiLU before lightning attention, and the log-probability of labels. float32 tensors on the CPU go through the
compiled functions of csrc/fused_cpu.cpp; all others, and a machine without a compiler, through the torch operations
that define them. Differentiable once.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import build, cpu
from kernels.attention import choose_backend, no_autocast

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Norm(ctypes.Structure):
    _fields_ = [
        ("x", _POINTER), ("residual", _POINTER), ("alpha", _FLOAT), ("weight", _POINTER), ("gate", _POINTER),
        ("epsilon", _FLOAT), ("sum", _POINTER), ("y", _POINTER), ("scale", _POINTER), ("grad_y", _POINTER),
        ("grad_x", _POINTER), ("grad_gate", _POINTER), ("partial", _POINTER), ("rows", _INT), ("width", _INT),
        ("threads", _INT),
    ]  # fmt: skip


class _SwiGLU(ctypes.Structure):
    _fields_ = [
        ("x", _POINTER), ("probability", _POINTER), ("y", _POINTER), ("grad_y", _POINTER), ("grad_x", _POINTER),
        ("grad_probability", _POINTER), ("rows", _INT), ("width", _INT), ("threads", _INT),
    ]  # fmt: skip


class _CrossEntropy(ctypes.Structure):
    _fields_ = [
        ("logits", _POINTER), ("labels", _POINTER), ("logprobs", _POINTER), ("normaliser", _POINTER),
        ("grad", _POINTER), ("grad_logits", _POINTER), ("rows", _INT), ("width", _INT), ("threads", _INT),
    ]  # fmt: skip


def _compiled(*tensors: Tensor | None) -> bool:
    """Whether there are compiled functions, and they take these tensors."""
    for x in tensors:
        if x is not None and (x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel()):
            return False
    return build.load() is not None


def _call(name: str, structure: type[ctypes.Structure], **fields: Any) -> None:
    """Call a compiled function with a structure of these fields; tensors stand for their addresses."""
    function = getattr(build.load(), name)
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    function(ctypes.byref(structure(threads=torch.get_num_threads(), **values)))


# ---- RMSNorm ----------------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """RMSNorm over the last dimension with what stands beside it in a layer.

    ``sigmoid(gate) * u / sqrt(mean(u^2) + epsilon) * weight`` with ``u = x + alpha * residual``.

    Args:
        x: (..., width), any floating dtype; computed in float32.
        weight: (width,).
        residual, gate: like x; at most one of them. None leaves that part out.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: shapes do not fit, or both a residual and a gate are given.
    """
    if residual is not None and gate is not None:
        raise ValueError("residual and gate exclude each other")
    for name, other, shape in (
        ("weight", weight, x.shape[-1:]),
        ("residual", residual, x.shape),
        ("gate", gate, x.shape),
    ):
        if other is not None and other.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(other.shape)}")
    if _compiled(x, weight, residual, gate):
        return _RMSNorm.apply(x, weight, epsilon, residual, alpha, gate)
    if residual is not None:
        x = torch.add(x, residual, alpha=alpha)
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), epsilon).type_as(x)
    return y if gate is None else torch.sigmoid(gate) * y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, alpha: float, gate: Tensor | None
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        residual, gate = (None if other is None else other.contiguous() for other in (residual, gate))
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        whole = x if residual is None else torch.empty_like(x)
        y, scale = torch.empty_like(x), x.new_empty(rows)
        _call(
            "norm_forward", _Norm, x=x, residual=residual, alpha=alpha, weight=weight, gate=gate,
            epsilon=epsilon, sum=whole, y=y, scale=scale, rows=rows, width=width,
        )  # fmt: skip
        ctx.save_for_backward(whole, weight, scale, gate)
        ctx.alpha = None if residual is None else alpha
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, gate = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), None if gate is None else torch.empty_like(x)
        partial = x.new_zeros(torch.get_num_threads(), x.shape[-1])
        _call(
            "norm_backward", _Norm, x=x, weight=weight, gate=gate, scale=scale,
            grad_y=grad_y.contiguous(), grad_x=grad_x, grad_gate=grad_gate, partial=partial, rows=len(scale),
            width=x.shape[-1],
        )  # fmt: skip
        grad_residual = None if ctx.alpha is None else ctx.alpha * grad_x
        return grad_x, partial.sum(dim=0), None, grad_residual, None, grad_gate


# ---- SwiGLU -----------------------------------------------------------------------------------------------------


def swiglu(x: Tensor, probability: Tensor) -> Tensor:
    """``silu(gate) * up * probability``, one expert's activation with the router's weight of each token.

    No gradient flows through: the caller's backward pass calls ``swiglu_backward``.

    Args:
        x: (tokens, 2 x width), the gate's channels before those of up.
        probability: (tokens,).

    Returns:
        (tokens, width) in the dtype of x.
    """
    if _compiled(x, probability):
        x, probability = x.contiguous(), probability.contiguous()
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        _call("swiglu_forward", _SwiGLU, x=x, probability=probability, y=y, rows=rows, width=width)
        return y
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate) * up * probability[:, None]).type_as(x)


def swiglu_backward(x: Tensor, probability: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``swiglu(x, probability)`` again, and the gradients of x and of the probabilities from that of the result."""
    if _compiled(x, probability, grad):
        x, probability, grad = x.contiguous(), probability.contiguous(), grad.contiguous()
        y, grad_x, grad_probability = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(probability)
        _call(
            "swiglu_backward", _SwiGLU, x=x, probability=probability, y=y, grad_y=grad, grad_x=grad_x,
            grad_probability=grad_probability, rows=x.shape[0], width=x.shape[1] // 2,
        )  # fmt: skip
        return y, grad_x, grad_probability
    with torch.enable_grad():
        leaves = x.detach().requires_grad_(), probability.detach().requires_grad_()
        y = swiglu(*leaves)
    grad_x, grad_probability = torch.autograd.grad(y, leaves, grad)
    return y.detach(), grad_x, grad_probability


# ---- SiLU and lightning attention -------------------------------------------------------------------------------


def silu_lightning(qkv: Tensor, slopes: Tensor, offsets: tuple[int, ...] | None = None) -> Tensor:
    """Lightning attention on ``silu(qkv)``, without copies of the thirds: they stay where the projection put them.

    Args:
        qkv: (sequence, batch, heads, 3 x head_dim), for each head its q, k and v.
        slopes: float32 (heads,).
        offsets: where packed samples begin, and the end; batch must be 1.

    Returns:
        (sequence, batch, heads, head_dim).
    """
    return _SiluLightning.apply(qkv, slopes, None if offsets is None else list(offsets))


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.permute(1, 2, 0, 3).split(x.shape[-1] // 3, dim=-1)
    return q, k, v


class _SiluLightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, slopes: Tensor, offsets: list[int] | None) -> Tensor:
        active = F.silu(qkv)
        ctx.save_for_backward(qkv, active, slopes)
        ctx.offsets = offsets
        with no_autocast(qkv):
            q, k, v = _thirds(active)
            out, _state = choose_backend(None, q).forward(q, k, v, slopes, None, offsets)
        return out.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, active, slopes = ctx.saved_tensors
        grad, grad_out = torch.empty_like(active), grad_out.permute(1, 2, 0, 3)
        with no_autocast(qkv):
            q, k, v = _thirds(active)
            backend = choose_backend(None, q)
            if backend is cpu:
                cpu.backward(q, k, v, slopes, None, ctx.offsets, grad_out, None, into=_thirds(grad))
            else:
                grads = backend.backward(q, k, v, slopes, None, ctx.offsets, grad_out, None)
                for part, whole in zip(grads, _thirds(grad)):
                    whole.copy_(part)
        return torch.ops.aten.silu_backward.grad_input(grad, qkv, grad_input=grad), None, None


# ---- log-probabilities ------------------------------------------------------------------------------------------


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label under the softmax of its logits.

    Args:
        logits: (..., vocabulary).
        labels: int64 (...).

    Returns:
        float32, the shape of labels.

    Raises:
        IndexError: a label outside the vocabulary.
    """
    if not _compiled(logits):
        return -F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none").view_as(labels)
    lowest, highest = labels.aminmax()
    if lowest < 0 or highest >= logits.shape[-1]:
        raise IndexError(f"labels from {int(lowest)} to {int(highest)} for a vocabulary of {logits.shape[-1]}")
    return _LabelLogprobs.apply(logits, labels)


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        width, rows = logits.shape[-1], labels.numel()
        logprobs = logits.new_empty(labels.shape)
        normaliser = logits.new_empty(2 * rows)
        _call(
            "cross_entropy_forward", _CrossEntropy, logits=logits, labels=labels,
            logprobs=logprobs, normaliser=normaliser, rows=rows, width=width,
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, normaliser)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, normaliser = ctx.saved_tensors
        width, grad_logits = logits.shape[-1], torch.empty_like(logits)
        _call(
            "cross_entropy_backward", _CrossEntropy, logits=logits, labels=labels,
            normaliser=normaliser, grad=grad.contiguous(), grad_logits=grad_logits, rows=labels.numel(), width=width,
        )  # fmt: skip
        return grad_logits, None
