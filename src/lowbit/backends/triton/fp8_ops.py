"""The float8 ops that the field calls by name: element-wise, flat, with eager's codes and values bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, floats, rounding
from lowbit.backends.triton.spans import span
from lowbit.backends.triton.tuning import Config, Grid, config, tuned
from lowbit.dispatch import kernel
from lowbit.numerics.floats import fp8_max

_CONFIGS: list[Config] = [config(BLOCK=1024, warps=4), config(BLOCK=2048, warps=4), config(BLOCK=4096, warps=8)]
_KINDS = {torch.float8_e4m3fn: rounding.E4M3, torch.float8_e5m2: rounding.E5M2}
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
_LARGEST_HALF = tl.constexpr(65504.0)
_NAN_KEPT = tl.constexpr(tl.PropagateNan.ALL)


@tuned(_CONFIGS, key=("count_bucket", "x", "KIND"))
@triton.jit(do_not_specialize=("count", "count_bucket"))
def _quantize(
    x, scale, out, count, count_bucket, LIMIT: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside = span(tl.program_id(0).to(tl.int64), count, EVEN, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    divisor = tl.load(scale).to(tl.float32)
    divisor = tl.where(divisor < _SMALLEST, _SMALLEST, divisor)  # NaN stays
    if (divisor > 7.888609052210118e-31) & (divisor < 1.2676506002282294e30):  # 2**-100, 2**100
        # What saturates is cut off before the division, which then meets no infinity.
        size = tl.minimum(tl.abs(value), LIMIT * divisor, propagate_nan=_NAN_KEPT)
        steps = rounding.quotient(size, divisor, tl.div_rn(1.0, divisor))
    else:
        steps = tl.div_rn(tl.abs(value), divisor + tl.zeros_like(value))
    steps = tl.minimum(steps, LIMIT, propagate_nan=_NAN_KEPT)
    tl.store(out + at, rounding.fp8_code(steps, value, None, KIND, CONVERTS), mask=inside)


@tuned(_CONFIGS, key=("count_bucket", "out", "KIND"))
@triton.jit(do_not_specialize=("count", "count_bucket"))
def _dequantize(x, scale, out, count, count_bucket, KIND: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = span(tl.program_id(0).to(tl.int64), count, EVEN, BLOCK)
    code = tl.load(x + at, mask=inside, other=0).to(tl.int32)
    value = floats.e4m3_value(code) if KIND[0] == 3 else floats.e5m2_value(code)
    value = value * tl.load(scale).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@tuned(_CONFIGS, key=("count_bucket", "x", "KIND"))
@triton.jit(do_not_specialize=("count", "count_bucket"))
def _round_stochastically(
    x, rng, out, count, count_bucket, LIMIT: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `numerics.floats.bytes_to_fp8`: the values as float16, and float16 arithmetic throughout."""
    MANTISSA: tl.constexpr = KIND[0]
    BIAS: tl.constexpr = 1 - KIND[1]
    at, inside = span(tl.program_id(0).to(tl.int64), count, EVEN, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    noise = tl.load(rng + at, mask=inside, other=0).to(tl.float32) * 0.00390625
    # Larger values saturate like the largest float16; a negative zero is one no more.
    size = tl.minimum(tl.abs(value), _LARGEST_HALF, propagate_nan=_NAN_KEPT).to(tl.float16).to(tl.float32)
    positive = size > 0.0
    power = tl.floor(tl.log2(tl.where(positive, size, 1.0)).to(tl.float16).to(tl.float32))
    field = tl.minimum(tl.maximum(power.to(tl.int32) + BIAS, 0), KIND[2] >> MANTISSA)
    field = tl.where(positive, field, 0)
    one = tl.where(field == 0, 0.0, (1 << MANTISSA) * 1.0)  # the implicit one, in steps
    exponent = tl.maximum(field, 1) - BIAS - MANTISSA
    up = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    step = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    mantissa = (size * up - one).to(tl.float16).to(tl.float32) + noise
    rounded = (tl.floor(mantissa.to(tl.float16).to(tl.float32)) + one) * step
    rounded = tl.minimum(rounded, LIMIT, propagate_nan=_NAN_KEPT)
    sign = tl.where(positive, value, 0.0)
    tl.store(out + at, rounding.fp8_code(rounded, sign, None, KIND, CONVERTS), mask=inside)


def _arguments(x: Tensor, kind: torch.dtype) -> dict[str, object]:
    count = x.numel()
    return {
        "count": count, "count_bucket": encoders.power_of_two(count), "KIND": _KINDS[kind], "EVEN": count % 16 == 0,
    }  # fmt: skip


def refuses_quantize(x: Tensor, scale: Tensor, output_type: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return encoders.refuses_values(values=x, scale=scale)


def refuses_dequantize(x: Tensor, scale: Tensor, output_type: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return encoders.refuses_result(output_type) or encoders.refuses_values(values=x, scale=scale)


def refuses_stochastic(x: Tensor, rng: Tensor, output_type: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return encoders.refuses_values(values=x, rng=rng)


@kernel("quantize_per_tensor_fp8", backend="triton", refuses=refuses_quantize)
def quantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    """x [...], scale of one value -> codes [...]."""
    out = torch.empty(x.shape, dtype=output_type, device=x.device)
    if x.numel():
        _quantize(
            _grid(x), x.device, x=x.contiguous(), scale=scale, out=out.view(torch.uint8), LIMIT=fp8_max(output_type),
            CONVERTS=encoders.converts(x.device), **_common(x, output_type),
        )  # fmt: skip
    return out


@kernel("dequantize_per_tensor_fp8", backend="triton", refuses=refuses_dequantize)
def dequantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    """codes [...], scale of one value -> [...] in `output_type`."""
    out = torch.empty(x.shape, dtype=output_type, device=x.device)
    if x.numel():
        codes = x.contiguous().view(torch.uint8)
        _dequantize(_grid(x), x.device, x=codes, scale=scale, out=out, **_common(x, x.dtype))
    return out


@kernel("stochastic_rounding_fp8", backend="triton", refuses=refuses_stochastic)
def stochastic_rounding_fp8(x: Tensor, rng: Tensor, output_type: torch.dtype) -> Tensor:
    """x [...], random bytes [...] -> codes [...]."""
    out = torch.empty(x.shape, dtype=output_type, device=x.device)
    if x.numel():
        _round_stochastically(
            _grid(x), x.device, x=x.contiguous(), rng=rng.contiguous(), out=out.view(torch.uint8),
            LIMIT=fp8_max(output_type), CONVERTS=encoders.converts(x.device), **_common(x, output_type),
        )  # fmt: skip
    return out


def _grid(x: Tensor) -> Grid:
    return lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)


def _common(x: Tensor, kind: torch.dtype) -> dict[str, Any]:
    count = x.numel()
    return {
        "count": count, "count_bucket": encoders.power_of_two(count), "KIND": _KINDS[kind], "EVEN": count % 16 == 0,
    }  # fmt: skip
