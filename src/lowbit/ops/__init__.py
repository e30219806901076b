"""The `lowbit::` operators: generic ones over any format, and the ones that the field knows by name."""

from lowbit.ops.awq import gemv_awq_w4a16
from lowbit.ops.fp8 import (
    dequantize_per_tensor_fp8,
    quantize_per_tensor_fp8,
    stochastic_rounding_fp8,
)
from lowbit.ops.generic import dequantize, embedding, linear, quantize
from lowbit.ops.grouped import grouped_linear
from lowbit.ops.int4_plain import int4_plain_mm
from lowbit.ops.int8 import (
    dequantize_int8,
    int8_linear,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
    quantize_int8_tensorwise,
)
from lowbit.ops.mxfp8 import dequantize_mxfp8, quantize_mxfp8, scaled_mm_mxfp8
from lowbit.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4, scaled_mm_nvfp4
from lowbit.ops.svdquant import quantize_svdquant_w4a4, scaled_mm_svdquant_w4a4

__all__ = [
    "dequantize",
    "dequantize_int8",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "dequantize_per_tensor_fp8",
    "embedding",
    "gemv_awq_w4a16",
    "grouped_linear",
    "int4_plain_mm",
    "int8_linear",
    "linear",
    "quantize",
    "quantize_int8_convrot_weight",
    "quantize_int8_rowwise",
    "quantize_int8_tensorwise",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_per_tensor_fp8",
    "quantize_svdquant_w4a4",
    "scaled_mm_mxfp8",
    "scaled_mm_nvfp4",
    "scaled_mm_svdquant_w4a4",
    "stochastic_rounding_fp8",
]
