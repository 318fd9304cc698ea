"""The experts of a MoE layer on this rank: w2 (silu(w1 x) * w3 x) p, one autograd step for all of them."""

from __future__ import annotations

from collections.abc import Sequence
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
        inner, out = x.new_empty(len(x), len(weights[0])), torch.empty_like(x)
        parts = zip(*(whole.split(counts) for whole in (x, probability, inner, out)), strict=True)
        for (rows, p, hidden, result), first, second in zip(parts, *_halves(weights), strict=True):
            torch.mm(rows, first.T, out=hidden)
            torch.mm(fused.swiglu(hidden, p), second.T, out=result)
        ctx.counts = counts
        ctx.save_for_backward(x, probability, inner, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probability, inner, *weights = ctx.saved_tensors
        grad_x, grad_p = torch.empty_like(x), torch.empty_like(probability)
        grad_first, grad_second = [], []
        wholes = (x, probability, inner, grad, grad_x, grad_p)
        parts = zip(*(whole.split(ctx.counts) for whole in wholes), strict=True)
        for (rows, p, hidden, g, g_rows, g_p), first, second in zip(parts, *_halves(weights), strict=True):
            active, g_hidden, g_probability = fused.swiglu_backward(hidden, p, g @ second)
            g_p.copy_(g_probability)
            torch.mm(g_hidden, first, out=g_rows)
            grad_first.append(g_hidden.T @ rows)
            grad_second.append(g.T @ active)
        return grad_x, grad_p, None, *grad_first, *grad_second


def _halves(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """w1 with w3 of every expert, and w2."""
    return weights[: len(weights) // 2], weights[len(weights) // 2 :]
