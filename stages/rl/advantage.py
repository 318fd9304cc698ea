"""Group-relative advantages (MiniMax-M1 report §3.1, Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Standard deviations up to this count as none: rewards that are equal but for float rounding.
ZERO_VARIANCE = 1e-6


def group_advantages(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(R - mean) / std within each group.

    The standard deviation is that of the group itself (divisor G, not G - 1) and nothing is added to it: groups
    without variance, which an epsilon would protect, teach nothing and are dropped.

    Args:
        rewards: float (groups, group size).

    Returns:
        Advantages like rewards, zero in groups without variance, and bool (groups,), whether the group has variance.
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    varied = deviation > ZERO_VARIANCE
    advantages = torch.where(varied, centred / deviation.clamp(min=ZERO_VARIANCE), 0.0)
    return advantages, varied[..., 0]
