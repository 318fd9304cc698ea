"""Policy-gradient objectives: pure functions of log-probabilities, advantages and a mask.

Every objective has the signature of `cispo` and is registered in `OBJECTIVES` under the name that the profile uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m1.config.rl import Cispo, Rl

#: Log-ratios are cut to +-20 before exp: float32 cannot overflow, and no bound in use is anywhere near e^20.
MAX_LOG_RATIO = 20.0

#: (logprobs, old_logprobs, advantages, mask, configuration, total_tokens) -> (loss, metrics)
Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: Cispo,
    *,
    total_tokens: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (MiniMax-M1 report §3.1, Eq. 4 and 5): -sum(sg(r_hat) A log pi) / number of tokens.

    r = exp(logprobs - old_logprobs) is the importance ratio, r_hat = min(max(r, is_weight_min), is_weight_max), and
    sg stops the gradient: the weight is clipped, never the token, so every token keeps a gradient. The bounds are
    values of the ratio itself, not distances from 1; without is_weight_min there is no lower bound, as in the report.

    Args:
        logprobs: float32 (sequences, tokens), of the sampled tokens under the policy being trained.
        old_logprobs: the same under the policy that the batch of rollouts started from; no gradient flows into it.
        advantages: (sequences, tokens), no gradient flows into it.
        mask: (sequences, tokens), 1 at response tokens, 0 elsewhere; values elsewhere may be anything finite.
        total_tokens: divides the sum; the default is the mask's sum. Whoever holds one part of a mini-batch passes
            the number of tokens of all of it (or 1, and divides later): then parts add up to the whole.

    Returns:
        The loss and detached metrics, each a mean over the mask's tokens except where said otherwise:
        cispo/clip_frac_high, cispo/clip_frac_low (share of ratios beyond the bound); cispo/is_weight_mean (of the
        clipped weight); cispo/is_weight_p99, cispo/is_weight_max (of the ratio before clipping, not means);
        cispo/clip_mass_positive, cispo/clip_mass_negative (weight removed by clipping, |r - r_hat| |A|, by the sign
        of A); policy/entropy_proxy (-log pi of the sampled tokens); policy/approx_kl (r - 1 - log r).
    """
    inside = mask > 0
    count = inside.sum().clamp(min=1)
    with torch.no_grad():
        log_ratio = torch.where(inside, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        weight = ratio.clamp(min=config.is_weight_min, max=config.is_weight_max)
    coefficient = torch.where(inside, weight * advantages, 0.0).detach()
    tokens = mask.sum().clamp(min=1) if total_tokens is None else total_tokens
    loss = -(coefficient * logprobs).sum() / tokens

    def mean(x: Tensor) -> Tensor:
        return (x.detach() * inside).sum() / count

    with torch.no_grad():
        inner = ratio[inside]
        removed = (ratio - weight).abs() * advantages.abs()
        low = torch.zeros_like(inside) if config.is_weight_min is None else ratio < config.is_weight_min
        metrics = {
            "cispo/clip_frac_high": mean((ratio > config.is_weight_max).float()),
            "cispo/clip_frac_low": mean(low.float()),
            "cispo/is_weight_mean": mean(weight),
            "cispo/is_weight_p99": percentile(inner, 0.99),
            "cispo/is_weight_max": inner.max() if inner.numel() else ratio.new_tensor(1.0),
            "cispo/clip_mass_positive": mean(removed * (advantages > 0)),
            "cispo/clip_mass_negative": mean(removed * (advantages < 0)),
            "policy/entropy_proxy": mean(-logprobs),
            "policy/approx_kl": mean(ratio - 1 - log_ratio),
        }
    return loss, metrics


def percentile(values: Tensor, fraction: float) -> Tensor:
    """Smallest of the values that at least `fraction` of them do not exceed; 1 if there are none."""
    if not values.numel():
        return values.new_tensor(1.0)
    rank = min(values.numel(), max(1, math.ceil(fraction * values.numel())))
    return values.flatten().kthvalue(rank).values


#: Name in the profile -> (function, its part of the RL section).
OBJECTIVES: dict[str, tuple[Objective, Callable[[Rl], Any]]] = {"cispo": (cispo, lambda section: section.cispo)}
