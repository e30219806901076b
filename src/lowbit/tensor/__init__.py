"""QuantizedTensor, the one tensor subclass, and the table of what it does for each operation."""

from lowbit.tensor.handlers import LowbitFallbackWarning, fallbacks, implements, shortcut
from lowbit.tensor.quantized import QuantizedTensor, rebuild_quantized_tensor

__all__ = [
    "LowbitFallbackWarning",
    "QuantizedTensor",
    "fallbacks",
    "implements",
    "rebuild_quantized_tensor",
    "shortcut",
]
