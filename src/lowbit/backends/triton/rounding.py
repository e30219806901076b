"""Rounding to small codes by the bits of float32: half to even, the same on every GPU and in the interpreter.

Adding 1.5 * 2**23 steps to a value leaves in the lowest bits of the sum how many steps it has, rounded half to even.
For a floating-point code the step follows from the value's exponent, but is never below that of the smallest normal
code, so that subnormal codes need nothing of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

E2M1 = tl.constexpr((1, 0, 7))
"""Bits of mantissa, exponent of the smallest normal value, largest code: 6."""
E4M3 = tl.constexpr((3, -6, 126))
"""As above; 448."""
E5M2 = tl.constexpr((2, -14, 123))
"""As above; 57344."""
INFINITY = tl.constexpr(0x7F800000)
"""Magnitudes from this one on are infinite or NaN."""
_EXPONENT = tl.constexpr(0x7F800000)
_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: its last bit is worth 1


@triton.jit
def magnitude(value):
    """The bits of |value|, float32: ordered as magnitudes are, infinity and then NaN last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quotient(value, divisor, reciprocal):
    """value / divisor as IEEE rounds it; reciprocal: 1 / divisor, rounded right.

    The product, corrected by its exact remainder (Brisebarre, Muller and Raina 2004): three operations, where a
    division proper has ten and a branch. The remainder must be finite and not much rounded for being subnormal, which
    divisors within 2**-100 .. 2**126 see to; quotients so small that it fails then are wrong in a last bit that no code
    shows. The sign of a zero is lost.
    """
    found = value * reciprocal
    return tl.fma(tl.fma(-found, divisor, value), reciprocal, found)


@triton.jit
def half_even(value):
    """float32 below 2**22 in magnitude -> int32, rounded half to even."""
    return (value + _INTEGER).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def float_code(value, noise, KIND: tl.constexpr):
    """Codes without their sign of float32 values >= 0 that the largest code can hold, or round to it: int32.

    KIND: `E2M1`, `E4M3` or `E5M2`. With noise, uniform in [0, 1), rounded up with the probability of the distance.
    """
    MANTISSA: tl.constexpr = KIND[0]
    LOWEST: tl.constexpr = 127 + KIND[1]
    power = tl.maximum(value.to(tl.int32, bitcast=True) & _EXPONENT, LOWEST << 23)
    base = (power >> (23 - MANTISSA)) - (LOWEST << MANTISSA)
    if noise is None:
        shifter = (power + ((23 - MANTISSA) << 23) + 0x400000).to(tl.float32, bitcast=True)
        steps = (value + shifter).to(tl.int32, bitcast=True) & ((4 << MANTISSA) - 1)
    else:
        above = power - (LOWEST << 23)
        inverse = (((254 + MANTISSA - LOWEST) << 23) - above).to(tl.float32, bitcast=True)  # of the step
        steps = (value * inverse + noise).to(tl.int32)
    return tl.minimum(base + steps, KIND[2])


@triton.jit
def sign_bit(value, BIT: tl.constexpr):
    """The sign of float32 values as int32 of this bit alone."""
    return (value.to(tl.int32, bitcast=True) >> (31 - BIT)) & (1 << BIT)


@triton.jit
def fp8_code(value, sign_of, noise, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """uint8 codes of float32 values within the range, with the sign of `sign_of`; NaN stays NaN.

    CONVERTS: the GPU has an instruction for it (sm_89 and later); noise: as in `float_code`.
    """
    if CONVERTS and noise is None:
        bits = magnitude(value) | (sign_of.to(tl.int32, bitcast=True) & -0x80000000)
        signed = bits.to(tl.float32, bitcast=True)
        if KIND[0] == 3:
            return signed.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return signed.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        size = tl.abs(value)
        code = tl.where(size == size, float_code(size, noise, KIND), 127)  # noqa: PLR0124
        return (code | sign_bit(sign_of, 7)).to(tl.uint8)


@triton.jit
def e8m0_code(largest, EXPONENT: tl.constexpr):
    """Bits of a magnitude -> code of the smallest power of two that is at least it / (1.75 * 2**EXPONENT): int32."""
    # A mantissa above 1.75 carries into the exponent.
    return tl.minimum(tl.maximum(((largest + 0x1FFFFF) >> 23) - EXPONENT, 0), 254)


@triton.jit
def bfloat16_bits(value):
    """The upper half of finite float32 values, rounded half to even: int32. The interpreter's own cast is wrong."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def store_rounded(at, value, inside):
    """Store float32 values as the dtype of a pointer and return them so rounded, as float32. int16 is for bfloat16."""
    if at.dtype.element_ty == tl.int16:
        bits = bfloat16_bits(value)
        tl.store(at, bits.to(tl.int16), mask=inside)
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        stored = value.to(at.dtype.element_ty)
        tl.store(at, stored, mask=inside)
        return stored.to(tl.float32)


@triton.jit
def nibbles(codes, LENGTH: tl.constexpr, HIGH_FIRST: tl.constexpr):
    """int32 codes 0..15 [R, G, LENGTH] -> uint8 [R, G, LENGTH / 2], the even column low, or high."""
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1], LENGTH // 2, 2)))
    if HIGH_FIRST:
        return ((even << 4) | odd).to(tl.uint8)
    else:
        return (even | (odd << 4)).to(tl.uint8)
