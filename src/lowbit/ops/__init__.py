"""The `lowbit::` operators: generic ones over any format, and the ones that the field knows by name."""

from lowbit.ops.fp8 import (
    dequantize_per_tensor_fp8,
    quantize_per_tensor_fp8,
    stochastic_rounding_fp8,
)
from lowbit.ops.generic import dequantize, embedding, linear, quantize
from lowbit.ops.int8 import (
    dequantize_int8,
    int8_linear,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
    quantize_int8_tensorwise,
)

__all__ = [
    "dequantize",
    "dequantize_int8",
    "dequantize_per_tensor_fp8",
    "embedding",
    "int8_linear",
    "linear",
    "quantize",
    "quantize_int8_convrot_weight",
    "quantize_int8_rowwise",
    "quantize_int8_tensorwise",
    "quantize_per_tensor_fp8",
    "stochastic_rounding_fp8",
]
