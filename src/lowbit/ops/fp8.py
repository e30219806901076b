"""The float8 ops that the field calls by name: one scale a tensor, and rounding with given random bytes.

    quantize_per_tensor_fp8(x, scale)      fp8(x / scale)          the scale decodes: x is about code * scale
    dequantize_per_tensor_fp8(x, scale)    x * scale
    stochastic_rounding_fp8(x, rng)        x rounded up or down    no scale: divide by it first

`output_type` of the first and the last is float8_e4m3fn or float8_e5m2. Rounding has no gradient: codes are detached
from x. Contracts: comfy-kitchen 0.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError, PartsError
from lowbit.formats.parts import FLOATS
from lowbit.ops.library import declare, run

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x of any shape, float -> float8 codes of that shape: x / scale in float32, rounded half to even, saturating.

    `scale`: one float value. A scale of 0 is taken as the smallest normal float32, so that zeros stay zeros; NaN stays.
    Raises `FormatError` for another `output_type`, `PartsError` for a scale that is not one value.
    """
    return _quantize_op(x.detach(), scale.detach(), output_type)


def dequantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype = torch.bfloat16) -> Tensor:
    """float8 codes of any shape -> code * scale, computed in float32 and cast once to `output_type`.

    Raises `FormatError` when x is not float8 or `output_type` not a wider float, `PartsError` for several scales.
    """
    return _dequantize_op(x, scale, output_type)


def stochastic_rounding_fp8(x: Tensor, rng: Tensor, output_type: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x of any shape -> float8 codes, rounded up with probability (distance to the lower neighbour) / (their distance).

    `rng`: uniform random uint8 of the shape of x; it is left as it is. x is taken as float16 first, as the op's
    contract says; values beyond the range saturate, NaN stays NaN, zeros become +0.
    Raises `FormatError` for another `output_type`, `PartsError` for an unfit `rng`.
    """
    return _stochastic_op(x.detach(), rng, output_type)


def _check_type(output_type: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if output_type not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise FormatError(f"output_type is {str(output_type).removeprefix('torch.')}, expected {names}")


def _check_scale(scale: Tensor) -> None:
    if scale.numel() != 1:
        raise PartsError(f"scale has shape {list(scale.shape)}, expected one value for the whole tensor")


def _check_quantize(x: Tensor, scale: Tensor, output_type: torch.dtype) -> None:
    _check_type(output_type, FP8_TYPES)
    _check_scale(scale)


def _check_dequantize(x: Tensor, scale: Tensor, output_type: torch.dtype) -> None:
    if x.dtype not in FP8_TYPES:
        raise FormatError(f"x is {str(x.dtype).removeprefix('torch.')}, expected float8_e4m3fn or float8_e5m2 codes")
    _check_type(output_type, (*FLOATS, torch.float64))
    _check_scale(scale)


def _check_stochastic(x: Tensor, rng: Tensor, output_type: torch.dtype) -> None:
    _check_type(output_type, FP8_TYPES)
    if rng.shape != x.shape or rng.dtype != torch.uint8:
        found = f"{str(rng.dtype).removeprefix('torch.')} {list(rng.shape)}"
        raise PartsError(f"rng is {found}, expected uint8 {list(x.shape)}: one random byte a value")


def _quantize(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    _check_quantize(x, scale, output_type)
    return run("quantize_per_tensor_fp8", x.device, x, scale, output_type)


def _quantize_fake(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    _check_quantize(x, scale, output_type)
    return x.new_empty(x.shape, dtype=output_type)


def _dequantize(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    _check_dequantize(x, scale, output_type)
    return run("dequantize_per_tensor_fp8", x.device, x, scale, output_type)


def _dequantize_fake(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    _check_dequantize(x, scale, output_type)
    return x.new_empty(x.shape, dtype=output_type)


def _stochastic(x: Tensor, rng: Tensor, output_type: torch.dtype) -> Tensor:
    _check_stochastic(x, rng, output_type)
    return run("stochastic_rounding_fp8", x.device, x, rng, output_type)


def _stochastic_fake(x: Tensor, rng: Tensor, output_type: torch.dtype) -> Tensor:
    _check_stochastic(x, rng, output_type)
    return x.new_empty(x.shape, dtype=output_type)


_quantize_op = declare(
    "quantize_per_tensor_fp8(Tensor x, Tensor scale, ScalarType output_type) -> Tensor", _quantize, _quantize_fake
)
_dequantize_op = declare(
    "dequantize_per_tensor_fp8(Tensor x, Tensor scale, ScalarType output_type) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
_stochastic_op = declare(
    "stochastic_rounding_fp8(Tensor x, Tensor rng, ScalarType output_type) -> Tensor", _stochastic, _stochastic_fake
)
