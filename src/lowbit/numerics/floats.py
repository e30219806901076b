"""Rounding to the small floating-point formats, and reading their codes.

Everything here is element-wise, works in float32 inside, rounds half to even and saturates. Codes of one byte are exact
for all 256 values, NaN included. The bit tricks are there because PyTorch's own float8 casts on a CPU are slow (8 ns a
value for reading e4m3) and because float4 has no cast at all.

e2m1: sign, 2 exponent bits (bias 1), 1 mantissa bit: 0 .5 1 1.5 2 3 4 6          (OCP MX v1.0, section 5.3.3)
e4m3: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity, 0x7f is NaN     (OCP FP8, "fn" variant)
e5m2: sign, 5 exponent bits (bias 15), 2 mantissa bits: the upper byte of a float16
e8m0: 8 exponent bits (bias 127), no sign: 2 ** (code - 127), 0xff is NaN
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E8M0_BIAS = 127
_EXPONENT_BITS = 0x7F800000  # of a float32


def fp8_max(dtype: torch.dtype) -> float:
    """The largest finite magnitude of an 8-bit float dtype."""
    return torch.finfo(dtype).max


def divisor(value: float | Tensor, x: Tensor) -> Tensor:
    """A number, or a scalar that is beside x already, by which x is divided with one rounding on every device.

    CUDA divides by a number, or by a scalar of the CPU, with the inverse of it, which rounds twice: scales, and codes
    next to a tie, would not be those of a CPU.
    """
    return value if isinstance(value, Tensor) else x.new_full((), value)


def all_finite(x: Tensor) -> bool:
    """Whether all of x is finite.

    Of float32 a finite sum says so in a sixth of the time; one that is not may have overflowed.
    """
    if x.dtype == torch.float32 and math.isfinite(float(x.sum())):
        return True
    return not x.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(x))  # NaN is both ends of its tensor


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype` (float8_e4m3fn or float8_e5m2), half to even, saturating. NaN stays NaN.

    The clamp is explicit: PyTorch's cast saturates in new releases and gives NaN or infinity in old ones.
    """
    limit = fp8_max(dtype)
    return x.float().clamp(-limit, limit).to(dtype)


def from_fp8(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read float8 codes exactly. Any shape; `codes` is float8_e4m3fn or float8_e5m2."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    if codes.dtype == torch.float8_e5m2:
        return (codes.view(torch.uint8).to(torch.int16) << 8).view(torch.float16).to(dtype)
    raw = codes.view(torch.int8)
    # Shifted left by seven, an e4m3 code is a float16 whose value is 2**-8 times too small; the sign-extended
    # copy of the sign bit in bit 14 has to go.
    half = ((raw.to(torch.int16) << 7) & -0x4001).view(torch.float16)
    out = half.float().mul_(256.0)
    magnitude = raw & 0x7F
    if magnitude.numel() and int(magnitude.max()) == 0x7F:
        out.masked_fill_(magnitude == 0x7F, float("nan"))
    return out.to(dtype)


def round_to_e2m1(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """Round float32 values to the nearest e2m1 value, half to even, saturating at 6. Keeps the sign of zero.

    With uniform `noise` in [0, 1), rounded stochastically.
    """
    if noise is not None:
        return stochastic_to_e2m1(x, noise)
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    # Adding and subtracting 1.5 * 2**23 steps rounds to a multiple of the step, half to even. The step is half of the
    # value's power of two, and never below one half.
    power = (magnitude.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    magic = power.clamp_(min=1.0).mul_(1.5 * 2.0**22)
    return magnitude.add_(magic).sub_(magic).copysign_(x)


def stochastic_to_e2m1(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 values to e2m1 up or down with probability given by the distance. `noise`: uniform [0, 1).

    The expected value of the result is x up to 6 in magnitude; beyond, it saturates. Keeps the sign of zero.
    """
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    power = (magnitude.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    step = power.clamp_(min=1.0).mul_(0.5)  # a power of two: dividing and multiplying by it is exact
    return magnitude.div_(step).add_(noise).floor_().mul_(step).clamp_(max=E2M1_MAX).copysign_(x)


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes 0..15 as uint8 of float32 values that are exactly e2m1 (from `round_to_e2m1`); bit 3 is the sign."""
    # As float16, an e2m1 value times 2**-14 has its three magnitude bits in bits 9..11 (subnormal 0.5 included).
    bits = (values * 2.0**-14).to(torch.float16).view(torch.int16)
    return (((bits >> 9) & 0x7) | ((bits >> 12) & 0x8)).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 values of e2m1 codes 0..15 (uint8)."""
    wide = codes.to(torch.int16)
    half = (((wide & 0x7) << 9) | ((wide & 0x8) << 12)).view(torch.float16)
    return half.float().mul_(2.0**14)


def e8m0_codes_round_up(x: Tensor) -> Tensor:
    """uint8 codes of the smallest power of two that is not below x (float32, finite, >= 0); zero gets code 0.

    Exact: works on the bits, so a value one ulp above a power of two rounds up, where `ceil(log2(x))` may not.
    """
    bits = x.float().contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & 0x7FFFFF
    # A float32 subnormal lies below 2**-126; its own power of two is code 0 up to 2**-127 and code 1 above.
    above = torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0)
    return (exponent + above.to(torch.int32)).clamp_(0, 254).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """float32 values 2**(code - 127) of uint8 codes; code 0 is 2**-127 (a float32 subnormal), 255 is NaN."""
    wide = codes.to(torch.int32)
    bits = torch.where(wide == 0, 0x400000, wide << 23)
    return torch.where(wide == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def stochastic_to_fp8(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round to float8 up or down with probability given by the distance. `noise`: uniform [0, 1), shape of x.

    The expected value of the result is x wherever x is in range; outside it saturates. NaN stays NaN.
    """
    mantissa_bits, min_exponent = (3, -6) if dtype == torch.float8_e4m3fn else (2, -14)
    limit = fp8_max(dtype)
    value = x.float().clamp(-limit, limit)
    power = (value.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(min=2.0**min_exponent)
    step = power * 2.0**-mantissa_bits
    rounded = (value.abs() / step + noise.float()).floor_() * step  # steps are powers of two: exact
    return rounded.clamp_(max=limit).copysign_(value).to(dtype)


def bytes_to_fp8(x: Tensor, rng: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to float8 stochastically with given random bytes (uint8, shape of x), as ComfyUI and comfy-kitchen do.

    x becomes float16; its mantissa in steps of the result, plus rng / 256, is rounded down, with float16 arithmetic
    throughout, so that the same bytes give the same codes there and here. One flaw is part of the contract: the float16
    logarithm takes values just below a power of two for that power, and the lowest bytes then round them down by two
    steps (the mean stays right). Where that gives NaN there, this saturates. Zeros become +0, NaN stays NaN.
    """
    bits, bias, top = (3, 7, 15) if dtype == torch.float8_e4m3fn else (2, 15, 30)
    half = x.to(torch.float16) + 0.0  # a negative zero loses its sign here; a negative value rounded to zero keeps it
    magnitude = half.abs()
    exponent = (magnitude.log2().floor_().float() + bias).clamp_(0, top).nan_to_num_(0.0).to(torch.int32)
    normal = exponent.ne(0).float() * 2**bits
    # The step of a subnormal is that of the smallest normal, which has an implicit one that the subnormal lacks.
    step = ((exponent.clamp_min_(1) + (127 - bias - bits)) << 23).view(torch.float32)
    mantissa = (magnitude.float() / step - normal).to(torch.float16) + (rng.float() / 256).to(torch.float16)
    rounded = (mantissa.float().floor_() + normal).mul_(step).clamp_(max=fp8_max(dtype))
    return rounded.mul_(half.float().sign_()).to(dtype)
