"""The mxfp8 ops that the field calls by name. Scales are powers of two, swizzled (`layouts.scale_128x4`).

    quantize_mxfp8(x)               x -> (codes, scales)    x is about code * scale; scales are rounded up
    dequantize_mxfp8(q, scales)     the values again, float32 inside, cast once
    scaled_mm_mxfp8(a, b, ...)      a b^T + bias

They are the activations' side of the format `mxfp8`, bit for bit. Contracts: comfy-kitchen 0.2, of which they differ by
running on every device, by exact scales for float32 input, and by reading scale code 0 as 2**-127, as the standard has
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.ops.block_scaled import BlockScaled, check_result_type
from lowbit.ops.library import declare, run

_OPERAND = BlockScaled(
    "mxfp8", group=32, stored=32, codes=torch.float8_e4m3fn, scales=(torch.float8_e8m0fnu, torch.uint8)
)


def quantize_mxfp8(x: Tensor, pad_32x: bool = False) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (float8_e4m3fn [M', K'], float8_e8m0fnu [roundup(M', 128), roundup(K' / 32, 4)] swizzled).

    `pad_32x` pads both sizes with zeros to multiples of 32, else M' = M and K' = K. NaN stays NaN; an infinity stays
    one too, with the largest code and scale.
    Raises `WeightError` when x is not a float matrix or K no multiple of 32 without padding.
    """
    codes, scale = _quantize_op(x, pad_32x)
    return codes, scale


def dequantize_mxfp8(qx: Tensor, block_scales: Tensor, output_type: torch.dtype = torch.bfloat16) -> Tensor:
    """float8_e4m3fn [M, K] and its swizzled scales (float8_e8m0fnu, or as uint8) -> [M, K] in `output_type`.

    Raises `PartsError` for codes or scales of the wrong dtype or shape, `FormatError` for an `output_type` that is no
    float.
    """
    return _dequantize_op(qx, block_scales, output_type)


def scaled_mm_mxfp8(
    a: Tensor,
    b: Tensor,
    block_scale_a: Tensor,
    block_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a float8_e4m3fn [M, K], b [N, K], their swizzled scales, bias [N] -> a b^T + bias: [M, N] in `out_dtype`.

    Sums and bias are float32; the result is cast once. Raises `PartsError` for operands, scales or a bias that do not
    fit each other, `FormatError` for an `out_dtype` that is no float.
    """
    return _mm_op(a, b, block_scale_a, block_scale_b, bias, out_dtype)


def _quantize(x: Tensor, pad_32x: bool) -> tuple[Tensor, Tensor]:
    _OPERAND.padded(x, pad_32x)
    codes, scale = run("quantize_mxfp8", x.device, x, pad_32x)
    return codes, scale


def _quantize_fake(x: Tensor, pad_32x: bool) -> tuple[Tensor, Tensor]:
    return _OPERAND.empty(x, pad_32x)


def _check_dequantize(qx: Tensor, block_scales: Tensor, output_type: torch.dtype) -> None:
    _OPERAND.check(qx, block_scales, "qx")
    check_result_type(output_type, "output_type")


def _dequantize(qx: Tensor, block_scales: Tensor, output_type: torch.dtype) -> Any:
    _check_dequantize(qx, block_scales, output_type)
    return run("dequantize_mxfp8", qx.device, qx, block_scales, output_type)


def _dequantize_fake(qx: Tensor, block_scales: Tensor, output_type: torch.dtype) -> Tensor:
    _check_dequantize(qx, block_scales, output_type)
    return qx.new_empty(qx.shape, dtype=output_type)


def _check_mm(
    a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    _OPERAND.check_product(a, b, block_scale_a, block_scale_b, bias)
    check_result_type(out_dtype, "out_dtype")


def _mm(*args: Any) -> Any:
    _check_mm(*args)
    return run("scaled_mm_mxfp8", args[0].device, *args)


def _mm_fake(*args: Any) -> Tensor:
    _check_mm(*args)
    a, b, out_dtype = args[0], args[1], args[5]
    out: Tensor = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    return out


_quantize_op = declare("quantize_mxfp8(Tensor x, bool pad_32x) -> (Tensor, Tensor)", _quantize, _quantize_fake)
_dequantize_op = declare(
    "dequantize_mxfp8(Tensor qx, Tensor block_scales, ScalarType output_type) -> Tensor", _dequantize, _dequantize_fake
)
_mm_op = declare(
    "scaled_mm_mxfp8(Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    _mm,
    _mm_fake,
)
