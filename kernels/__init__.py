"""Lightning attention: tensors in, tensors out. See docs/kernels.md."""

from kernels.attention import lightning_attention, lightning_decode
from kernels.slopes import lightning_slopes

__all__ = ["lightning_attention", "lightning_decode", "lightning_slopes"]
