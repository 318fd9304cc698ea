"""Decay rates of lightning attention, per head and per layer (MiniMax-01, arXiv 2501.08313 §2.2)."""

import math

import torch
from torch import Tensor


def lightning_slopes(num_heads: int, layer_index: int, num_layers: int) -> Tensor:
    """Decay slopes of one layer: a token's weight falls by ``exp(-slope)`` with every later token.

    Head h of H (counted from 1) has the ALiBi slope ``2^(-8h/H)``; layer l of L multiplies all of them by
    ``1 - l/(L-1) + 1e-5``, so early layers are local and the last one hardly forgets. Head counts that are no
    power of two take the series of the next smaller power and fill up with every second entry of the series of
    twice that power, as ALiBi does (arXiv 2108.12409).

    Args:
        num_heads: heads of the whole layer (before any tensor-parallel split).
        layer_index: position of the layer in the model, from 0, counting layers of every kind.
        num_layers: layers of the whole model.

    Returns:
        float32 tensor of shape (num_heads,). Keep it in float32: rounded to bfloat16 the decay is another one.

    Raises:
        ValueError: a count below one, or a layer index outside [0, num_layers).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index must lie in [0, {num_layers}), got {layer_index}")
    layer_factor = 1 - layer_index / max(num_layers - 1, 1) + 1e-5
    return torch.tensor(
        [slope * layer_factor for slope in _alibi_series(num_heads)],
        dtype=torch.float32,
    )


def _alibi_series(num_heads: int) -> list[float]:
    power = 2 ** int(math.log2(num_heads))
    series = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    if power == num_heads:
        return series
    finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)]
    return series + finer[0::2][: num_heads - power]
