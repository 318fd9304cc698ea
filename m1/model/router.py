"""Routing of tokens to experts: float32, load-balanced over the global batch, counted.

The auxiliary loss is that of GShard and Switch: E sum_i f_i P_i for E experts, f_i the share of the tokens that expert
i was chosen for (over k, the experts of a token), P_i its mean probability; 1 at even load. Both are taken over the
global batch - every micro-batch of every rank, padding left out - so the loss does not depend on the layout
(arXiv 2501.08313 §2.1, and arXiv 2501.11873 on why the global batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class HybridRouter(TopKRouter):
    """Megatron's top-k router with this loss, and with counts of what it does in a training step.

    Attributes:
        routed: float64 (experts,), how often each expert was chosen by this rank's tokens since `begin`.
        dropped: float64, how many of these choices exceeded the capacity.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.begin("off")

    def begin(
        self,
        mode: Literal["off", "count", "train"],
        *,
        weight: float = 0.0,
        tokens: float = 1.0,
        shares: Tensor | None = None,
    ) -> None:
        """Forget the counts and start a pass over a global batch.

        Args:
            mode: "count" counts and adds no loss; "train" does both where gradients are computed.
            weight: factor of the auxiliary loss in the gradient; zero leaves it out.
            tokens: of the global batch, without padding.
            shares: float32 (experts,), f over the whole global batch. Without it, f is counted over the micro-batches
                of all ranks up to the present one: the same where a rank has one micro-batch.
        """
        device = torch.cuda.current_device()
        self.mode, self.aux_weight, self.tokens = mode, weight, tokens
        self.shares = None if shares is None else lambda: shares
        self.routed = torch.zeros(self.num_experts, dtype=torch.float64, device=device)
        self.dropped = torch.zeros((), dtype=torch.float64, device=device)
        self.parts: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self.seen: _Seen | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: float32 (sequence, batch, experts).
            padding_mask: bool (sequence, batch), True at padding.

        Returns:
            Weights and choices, float32 and bool (tokens, experts).
        """
        logits = logits.view(-1, self.num_experts)
        real = None if padding_mask is None else ~padding_mask.reshape(-1, 1)
        weights, chosen = topk_routing_with_score_function(logits, self.topk, score_function="softmax")
        kept, factor = chosen, self.config.moe_expert_capacity_factor
        if factor is not None:
            if real is not None:  # padding takes no place
                weights, chosen = weights * real, chosen & real
            weights, kept = apply_router_token_dropping(weights, chosen, self.topk, factor)
        # Activation recomputation runs the forward pass twice, the first time without gradients.
        if self.mode == "count" or (self.mode == "train" and torch.is_grad_enabled()):
            routed = chosen if real is None else chosen & real
            counts = routed.sum(dim=0)
            self.routed += counts
            if factor is not None:
                self.dropped += (chosen & ~kept).sum()
            if self.mode == "train" and self.aux_weight:
                weights = MoEAuxLossAutoScaler.apply(weights, self._aux_loss(logits, real, counts) * self.aux_weight)
        return weights, kept

    def aux_loss(self) -> Tensor:
        """This rank's part of the auxiliary loss since `begin`, float64, without its coefficient."""
        total = torch.zeros_like(self.dropped)
        for mass, shares in self.parts:
            total += (shares() * mass).sum()
        return self.num_experts * total / self.tokens

    def _aux_loss(self, logits: Tensor, real: Tensor | None, counts: Tensor) -> Tensor:
        """This micro-batch's part of the auxiliary loss, as far as its gradient goes: its value is `aux_loss`."""
        shares = self.shares
        if shares is None:
            self.seen = _Seen(counts.to(torch.float64), self.tp_dp_cp_group, self.seen)
            shares = self.seen.shares
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        if real is not None:
            probabilities = probabilities * real
        mass = probabilities.sum(dim=0)
        self.parts.append((mass.detach(), shares))
        return self.num_experts * _WithShares.apply(mass, shares) / self.tokens


class _Seen:
    """How often each expert was chosen on all ranks up to a micro-batch, on the way until somebody asks.

    Ranks that waited for each other's counts in every layer would go through the forward pass in lockstep.

    Args:
        counts: of this micro-batch on this rank, float64 (experts,).
        before: those up to the micro-batch before.
    """

    def __init__(self, counts: Tensor, group: Any, before: _Seen | None) -> None:
        self._counts, self._before = counts, before
        self._work = torch.distributed.all_reduce(counts, group=group, async_op=True)

    def counts(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            if self._before is not None:
                self._counts += self._before.counts()
            self._work = self._before = None
        return self._counts

    def shares(self) -> Tensor:
        return shares_of(self.counts())


class _WithShares(torch.autograd.Function):
    """sum_i f_i P_i where f is known in the backward pass only; the value given is zero."""

    @staticmethod
    def forward(ctx: Any, mass: Tensor, shares: Callable[[], Tensor]) -> Tensor:
        ctx.shares = shares
        return mass.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.shares(), None


def shares_of(counts: Tensor) -> Tensor:
    """f from counts (..., experts): float32, sums to one over the experts."""
    return (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)).float()


def routers(chunks: list[Any]) -> list[HybridRouter]:
    """The routers of these parts of a model, in the order of their layers."""
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, HybridRouter)]
    return sorted(found, key=lambda router: router.layer_number)
