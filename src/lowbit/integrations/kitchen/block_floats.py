"""The float8, nvfp4 and mxfp8 functions of comfy_kitchen, on the ops of those names."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import ops


def quantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x of any shape -> float8 codes of x / scale, divided in float32. See `lowbit.ops.quantize_per_tensor_fp8`."""
    return ops.quantize_per_tensor_fp8(x, scale, output_type)


def dequantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype = torch.bfloat16) -> Tensor:
    """float8 codes -> code * scale, in float32, cast once. See `lowbit.ops.dequantize_per_tensor_fp8`."""
    return ops.dequantize_per_tensor_fp8(x, scale, output_type)


def stochastic_rounding_fp8(x: Tensor, rng: Tensor, output_type: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x -> float8 codes, rounded with the random bytes `rng`, which stay. See `lowbit.ops.stochastic_rounding_fp8`."""
    return ops.stochastic_rounding_fp8(x, rng, output_type)


def quantize_nvfp4(
    x: Tensor, per_tensor_scale: Tensor, epsilon: float = 0.0, pad_16x: bool = False, hi_first: bool = True
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> bytes and swizzled float8_e4m3fn scales. See `lowbit.ops.quantize_nvfp4`."""
    return ops.quantize_nvfp4(x, per_tensor_scale, epsilon, pad_16x, hi_first)


def dequantize_nvfp4(
    qx: Tensor,
    per_tensor_scale: Tensor,
    block_scales: Tensor,
    output_type: torch.dtype = torch.bfloat16,
    hi_first: bool = True,
) -> Tensor:
    """Bytes and swizzled scales -> [M, K], in float32, cast once. See `lowbit.ops.dequantize_nvfp4`."""
    return ops.dequantize_nvfp4(qx, per_tensor_scale, block_scales, output_type, hi_first)


def scaled_mm_nvfp4(
    a: Tensor,
    b: Tensor,
    tensor_scale_a: Tensor,
    tensor_scale_b: Tensor,
    block_scale_a: Tensor,
    block_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """a b^T * alpha + bias -> [M, N] in `out_dtype` (bfloat16). See `lowbit.ops.scaled_mm_nvfp4`."""
    dtype = out_dtype or torch.bfloat16
    scales = tensor_scale_a, tensor_scale_b, block_scale_a, block_scale_b
    return ops.scaled_mm_nvfp4(a, b, *scales, bias, dtype, alpha)


def quantize_mxfp8(x: Tensor, pad_32x: bool = False) -> tuple[Tensor, Tensor]:
    """x [M, K] -> float8_e4m3fn codes and swizzled float8_e8m0fnu scales. See `lowbit.ops.quantize_mxfp8`."""
    return ops.quantize_mxfp8(x, pad_32x)


def dequantize_mxfp8(qx: Tensor, block_scales: Tensor, output_type: torch.dtype = torch.bfloat16) -> Tensor:
    """Codes and swizzled scales -> [M, K], in float32, cast once. See `lowbit.ops.dequantize_mxfp8`."""
    return ops.dequantize_mxfp8(qx, block_scales, output_type)


def scaled_mm_mxfp8(
    a: Tensor,
    b: Tensor,
    block_scale_a: Tensor,
    block_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """a b^T + bias -> [M, N] in `out_dtype` (bfloat16). See `lowbit.ops.scaled_mm_mxfp8`."""
    return ops.scaled_mm_mxfp8(a, b, block_scale_a, block_scale_b, bias, out_dtype or torch.bfloat16)
