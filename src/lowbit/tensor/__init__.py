"""QuantizedTensor, the one tensor subclass, and the table of what it does for each operation."""

from lowbit.tensor.handlers import LowbitFallbackWarning, fallbacks, implements, shortcut
from lowbit.tensor.quantized import QuantizedTensor, rebuild_quantized_tensor
from lowbit.tensor.repack import AUTO, check_layout, choose_layout, repacked

__all__ = [
    "AUTO",
    "LowbitFallbackWarning",
    "QuantizedTensor",
    "check_layout",
    "choose_layout",
    "fallbacks",
    "implements",
    "rebuild_quantized_tensor",
    "repacked",
    "shortcut",
]
