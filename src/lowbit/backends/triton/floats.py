"""Small floating-point codes as float32, by their bits: on every GPU, whatever conversions it has.

A code is moved to where float32 has its exponent and mantissa; the difference of the exponent biases is a product with
a power of two, which is exact and makes subnormal codes right, too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_value(code):
    """int32 codes 0..255 of float8_e4m3fn -> float32; 127 and 255 are NaN."""
    magnitude = code & 127
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    value = tl.where(magnitude == 127, float("nan"), value)
    return tl.where(code > 127, -value, value)


@triton.jit
def e5m2_value(code):
    """int32 codes 0..255 of float8_e5m2 -> float32: the upper byte of a float16."""
    return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e8m0_value(code):
    """int32 codes 0..255 -> float32 powers of two, 2**(code - 127); 255 is NaN."""
    value = tl.where(code == 0, 1 << 22, code << 23).to(tl.float32, bitcast=True)  # 2**-127 is subnormal
    return tl.where(code == 255, float("nan"), value)
