"""The nvfp4 ops that the field calls by name. Scales are swizzled (`layouts.scale_128x4`), nibbles high-first.

    quantize_nvfp4(x, s)            x -> (codes, scales)    x is about code * scale * s; s = amax / 2688 uses all codes
    dequantize_nvfp4(q, s, scales)  the values again, float32 inside, cast once
    scaled_mm_nvfp4(a, b, ...)      a b^T * alpha + bias

They are the activations' side of the format `nvfp4`, bit for bit. Contracts: comfy-kitchen 0.2, of which they differ by
running on every device, reading `alpha`, taking float32, and giving zeros for a tensor scale of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.ops.block_scaled import BlockScaled, check_one_value, check_result_type
from lowbit.ops.library import declare, run

_OPERAND = BlockScaled("nvfp4", group=16, stored=8, codes=torch.uint8, scales=(torch.float8_e4m3fn,))


def quantize_nvfp4(
    x: Tensor, per_tensor_scale: Tensor, epsilon: float = 0.0, pad_16x: bool = False, hi_first: bool = True
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (uint8 [M', K' / 2], float8_e4m3fn [roundup(M', 128), roundup(K' / 16, 4)] swizzled).

    `pad_16x` pads both sizes with zeros to multiples of 16, else M' = M and K' = K. `hi_first` puts the even column
    into the high nibble. `epsilon` is part of the field's signature and changes nothing: zeros are exact without it.
    NaN in a group makes its scale NaN. Raises `WeightError` when x is not a float matrix or K no multiple of 16 without
    padding, `PartsError` for a scale that is not one value.
    """
    codes, scale = _quantize_op(x, per_tensor_scale, epsilon, pad_16x, hi_first)
    return codes, scale


def dequantize_nvfp4(
    qx: Tensor,
    per_tensor_scale: Tensor,
    block_scales: Tensor,
    output_type: torch.dtype = torch.bfloat16,
    hi_first: bool = True,
) -> Tensor:
    """uint8 [M, K / 2] and its swizzled scales -> code * (scale * per_tensor_scale), [M, K] in `output_type`.

    Raises `PartsError` for codes or scales of the wrong dtype or shape, `FormatError` for an `output_type` that is no
    float.
    """
    return _dequantize_op(qx, per_tensor_scale, block_scales, output_type, hi_first)


def scaled_mm_nvfp4(
    a: Tensor,
    b: Tensor,
    tensor_scale_a: Tensor,
    tensor_scale_b: Tensor,
    block_scale_a: Tensor,
    block_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    alpha: Tensor | None = None,
) -> Tensor:
    """a uint8 [M, K / 2], b uint8 [N, K / 2], swizzled scales, bias [N] -> a b^T * alpha + bias: [M, N] in `out_dtype`.

    `alpha`: one float32 value, taken instead of tensor_scale_a * tensor_scale_b. Sums, alpha and bias are float32; the
    result is cast once. Both operands have the same nibble order; which one does not matter to a product. Raises
    `PartsError` for operands, scales or a bias that do not fit each other, `FormatError` for an `out_dtype` that is no
    float.
    """
    return _mm_op(a, b, tensor_scale_a, tensor_scale_b, block_scale_a, block_scale_b, bias, out_dtype, alpha)


def _check_quantize(x: Tensor, per_tensor_scale: Tensor, pad_16x: bool) -> None:
    _OPERAND.padded(x, pad_16x)
    check_one_value("per_tensor_scale", per_tensor_scale)


def _quantize(
    x: Tensor, per_tensor_scale: Tensor, epsilon: float, pad_16x: bool, hi_first: bool
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, per_tensor_scale, pad_16x)
    codes, scale = run("quantize_nvfp4", x.device, x, per_tensor_scale, epsilon, pad_16x, hi_first)
    return codes, scale


def _quantize_fake(
    x: Tensor, per_tensor_scale: Tensor, epsilon: float, pad_16x: bool, hi_first: bool
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, per_tensor_scale, pad_16x)
    return _OPERAND.empty(x, pad_16x)


def _check_dequantize(qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype) -> None:
    _OPERAND.check(qx, block_scales, "qx")
    check_one_value("per_tensor_scale", per_tensor_scale)
    check_result_type(output_type, "output_type")


def _dequantize(
    qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype, hi_first: bool
) -> Any:
    _check_dequantize(qx, per_tensor_scale, block_scales, output_type)
    return run("dequantize_nvfp4", qx.device, qx, per_tensor_scale, block_scales, output_type, hi_first)


def _dequantize_fake(
    qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype, hi_first: bool
) -> Tensor:
    _check_dequantize(qx, per_tensor_scale, block_scales, output_type)
    return qx.new_empty((qx.shape[0], _OPERAND.columns(qx)), dtype=output_type)


def _check_mm(
    a: Tensor,
    b: Tensor,
    tensor_scale_a: Tensor,
    tensor_scale_b: Tensor,
    block_scale_a: Tensor,
    block_scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    alpha: Tensor | None,
) -> None:
    _OPERAND.check_product(a, b, block_scale_a, block_scale_b, bias)
    check_one_value("tensor_scale_a", tensor_scale_a)
    check_one_value("tensor_scale_b", tensor_scale_b)
    check_one_value("alpha", alpha)
    check_result_type(out_dtype, "out_dtype")


def _mm(*args: Any) -> Any:
    _check_mm(*args)
    return run("scaled_mm_nvfp4", args[0].device, *args)


def _mm_fake(*args: Any) -> Tensor:
    _check_mm(*args)
    a, b, out_dtype = args[0], args[1], args[7]
    out: Tensor = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    return out


_quantize_op = declare(
    "quantize_nvfp4(Tensor x, Tensor per_tensor_scale, float epsilon, bool pad_16x, bool hi_first) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
_dequantize_op = declare(
    "dequantize_nvfp4(Tensor qx, Tensor per_tensor_scale, Tensor block_scales, ScalarType output_type, bool hi_first)"
    " -> Tensor",
    _dequantize,
    _dequantize_fake,
)
_mm_op = declare(
    "scaled_mm_nvfp4(Tensor a, Tensor b, Tensor tensor_scale_a, Tensor tensor_scale_b, Tensor block_scale_a, "
    "Tensor block_scale_b, Tensor? bias, ScalarType out_dtype, Tensor? alpha) -> Tensor",
    _mm,
    _mm_fake,
)
