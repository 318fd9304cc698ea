"""The experts of a MoE layer on this rank: w2 (silu(w1 x) * w3 x) p, one autograd step for all of them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import fused


class Experts(SequentialMLP):
    """Megatron's experts one after another, without its operations between the matrix products.

    Tokens come sorted by expert from the dispatcher, which also does all communication.
    """

    def forward(  # type: ignore[override]
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """(tokens, hidden), int64 (experts,), (tokens,) -> (tokens, hidden)."""
        first = [expert.linear_fc1.weight for expert in self.local_experts]
        second = [expert.linear_fc2.weight for expert in self.local_experts]
        counts = tokens_per_expert.tolist()
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *first, *second), None


class _Experts(torch.autograd.Function):
    """Keeps the input and the first products; the activation is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        first, second = weights[: len(counts)], weights[len(counts) :]
        inner = x.new_empty(len(x), len(first[0]))
        for rows, part, weight in zip(x.split(counts), inner.split(counts), first, strict=True):
            torch.mm(rows, weight.T, out=part)
        active, out = fused.swiglu(inner, probability), torch.empty_like(x)
        for rows, part, weight in zip(active.split(counts), out.split(counts), second, strict=True):
            torch.mm(rows, weight.T, out=part)
        ctx.counts = counts
        ctx.save_for_backward(x, probability, inner, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probability, inner, *weights = ctx.saved_tensors
        counts = ctx.counts
        first, second = weights[: len(counts)], weights[len(counts) :]
        grad_active = x.new_empty(len(x), second[0].shape[1])
        for rows, part, weight in zip(grad.split(counts), grad_active.split(counts), second, strict=True):
            torch.mm(rows, weight, out=part)
        active, grad_inner, grad_probability = fused.swiglu_backward(inner, probability, grad_active)
        grad_x = torch.empty_like(x)
        for rows, part, weight in zip(grad_inner.split(counts), grad_x.split(counts), first, strict=True):
            torch.mm(rows, weight, out=part)
        grad_first = [g.T @ rows for g, rows in zip(grad_inner.split(counts), x.split(counts), strict=True)]
        grad_second = [g.T @ rows for g, rows in zip(grad.split(counts), active.split(counts), strict=True)]
        return grad_x, grad_probability, None, *grad_first, *grad_second
