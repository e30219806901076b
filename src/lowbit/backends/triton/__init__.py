"""Kernels in Triton for GPUs: compiled at first use, no build step. The import fails, in words, where Triton is not."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is None:  # before any kernel is registered: a backend is there as a whole, or not
    raise ImportError("Triton is not installed; pip install triton (Linux), or a build of PyTorch that brings it")

from lowbit.backends.triton import (
    dequantize,
    dequantize_int8,
    embedding,
    fp8_ops,
    gemv_awq_w4a16,
    gguf_rows,
    int4_plain_mm,
    int8_ops,
    linear_awq_w4a16,
    linear_convrot_w4a4,
    linear_fp8,
    linear_gguf,
    linear_input_gradient,
    linear_int8,
    linear_mxfp4,
    linear_mxfp8,
    linear_nvfp4,
    linear_plain,
    linear_svdquant_w4a4,
    linear_wna16,
    mxfp8_ops,
    nvfp4_ops,
    quantize_granular,
    quantize_int8_tensor,
    quantize_integer_groups,
    quantize_mx,
    quantize_nvfp4,
    scaled_mm_mxfp8,
    scaled_mm_nvfp4,
)

__all__ = [
    "dequantize",
    "dequantize_int8",
    "embedding",
    "fp8_ops",
    "gemv_awq_w4a16",
    "gguf_rows",
    "int4_plain_mm",
    "int8_ops",
    "linear_awq_w4a16",
    "linear_convrot_w4a4",
    "linear_fp8",
    "linear_gguf",
    "linear_input_gradient",
    "linear_int8",
    "linear_mxfp4",
    "linear_mxfp8",
    "linear_nvfp4",
    "linear_plain",
    "linear_svdquant_w4a4",
    "linear_wna16",
    "mxfp8_ops",
    "nvfp4_ops",
    "quantize_granular",
    "quantize_int8_tensor",
    "quantize_integer_groups",
    "quantize_mx",
    "quantize_nvfp4",
    "scaled_mm_mxfp8",
    "scaled_mm_nvfp4",
]
