"""RMSNorm, for replicated channels and for channels split over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from kernels.fused import rms_norm


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    Under sequence parallelism every rank sees part of the tokens, so the weight's gradient is summed over the
    tensor-parallel ranks; Megatron does so for parameters with the attribute `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, residual: Tensor | None = None, alpha: float = 1.0) -> Tensor:
        """The norm of x + alpha * residual."""
        return rms_norm(x, self.weight, self.eps, residual=residual, alpha=alpha)


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm over channels that are split over the tensor-parallel ranks (the merged lightning heads).

    Args:
        channels: channels on all ranks together; this rank holds channels / tensor-parallel size of them.
    """

    def __init__(self, config: TransformerConfig, channels: int, eps: float, group: Any) -> None:
        super().__init__()
        self.eps, self.channels, self.group = eps, channels, group
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(channels // group.size(), dtype=config.params_dtype, device=device))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """The norm of x times sigmoid(gate)."""
        if self.group.size() == 1:
            return rms_norm(x, self.weight, self.eps, gate=gate)
        y = x.float()
        total = all_reduce(y.square().sum(-1, keepdim=True), group=self.group)
        y = y * torch.rsqrt(total / self.channels + self.eps) * self.weight.float()
        return torch.sigmoid(gate) * y.type_as(x)
