"""Four codes of 8 bits in a word, as four tensors of floats: what the kernels over one byte a weight share.

`decode` gives byte j of every word as value j: a float8_e4m3fn, a float8_e5m2 or an integer -128..127. As they are, all
are exact in bfloat16 and in float16; times a float32 factor they are rounded once. On NVIDIA GPUs it is PTX (`program`)
that makes two values in a register at a time:

e4m3   from sm_89 on the GPU converts it to float16, NaN included. Before, its bits are moved to where the float has its
       exponent and mantissa, and the product with the power of two that is the difference of the exponent biases is
       exact. There the codes 127 and 255 would be 480, which has no code: times 1.125 * 2**119 (bfloat16) or 144
       (float16) 480 alone is infinite, 448 and less are not, and zero times that product is added: NaN or nothing.
e5m2   the upper byte of a float16.
int8   in float16, code + 128 is put into the mantissa of 1024, whose last bit is worth 1. The mantissa of bfloat16 is a
       bit too short: the lower 7 bits go into that of 128, bit 7 makes the same 128 a 256, and the difference is exact.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from lowbit.backends.triton.device import Target
from lowbit.backends.triton.floats import e4m3_value, e5m2_value

E4M3, E5M2, INT8 = (tl.constexpr(i) for i in range(3))
_CONVERTS_E4M3 = (8, 9)  # the first compute capability that does
_FOUR_OUT, _FOUR_OUT_SCALED = tl.constexpr("=h,=h,=h,=h,r"), tl.constexpr("=h,=h,=h,=h,r,f")

# A word in $4, a factor in $5, values out in $0 to $3.
_REGISTERS = """
.reg .b16 l, h;
.reg .b32 p, q, s, t, u, one, minus, most, none;
.reg .f32 low, high;
"""
_SIGNED = ("0x9180", "0xB3A2")  # bytes 0, 1 (2, 3) in the lower halves of two lanes, below copies of their sign bits
_UPPER = ("0x1404", "0x3424")  # the bytes in the upper halves, bytes of the second operand below
_LOWER = ("0x4140", "0x4342")  # the bytes in the lower halves, bytes of the second operand above


def program(code: tl.constexpr, dtype: torch.dtype, target: Target, *, scaled: bool) -> str:
    """The PTX that decodes to a dtype, `scaled` by a factor or not; "" where there is none."""
    if not target.assembles or dtype == torch.float32:
        return ""
    return _program(int(code.value), dtype == torch.bfloat16, target.capability >= _CONVERTS_E4M3, scaled)


@cache
def _program(code: int, bf16: bool, converts: bool, scaled: bool) -> str:
    wide = ("bf16x2" if bf16 else "f16x2") if scaled else ""  # then by way of float32
    if code == E4M3.value and converts:
        lines, wide = _E4M3_CONVERTED, wide or ("bf16x2" if bf16 else "")
    elif code == E4M3.value:
        lines = _E4M3_BF16 if bf16 and not scaled else _E4M3_FP16
    elif code == E5M2.value:
        lines, wide = _E5M2_FP16, wide or ("bf16x2" if bf16 else "")
    else:
        lines = _INT8_BF16 if bf16 and not scaled else _INT8_FP16
    lines = list(lines)  # that leave two pairs in p and q, float16 where they are to be made `wide`
    for pair, out in (("p", "{$0, $1}"), ("q", "{$2, $3}")):
        if wide:
            lines += [f"mov.b32 {{l, h}}, {pair};", "cvt.f32.f16 low, l;", "cvt.f32.f16 high, h;"]
            lines += ["mul.f32 low, low, $5;", "mul.f32 high, high, $5;"] if scaled else []
            lines += [f"cvt.rn.{wide}.f32 {pair}, high, low;"]
        lines += [f"mov.b32 {out}, {pair};"]
    return "{" + _REGISTERS + "\n".join(lines) + "\n}"


def _e4m3_by_bits(places: int, mask: str, scale: str, most: str, fma: str) -> list[str]:
    """Signs and magnitudes moved up by `places`, times `scale`; NaN where the product with `most` is infinite."""
    lines = [f"mov.b32 one, {scale};", f"mov.b32 most, {most};", "mov.b32 minus, 0x80008000;", "mov.b32 none, 0;"]
    for pair, selector in zip("pq", _SIGNED, strict=True):
        lines += [
            f"prmt.b32 t, $4, 0, {selector};",
            f"shl.b32 t, t, {places};",
            f"and.b32 t, t, {mask};",
            f"fma.rn.{fma} t, t, one, minus;",
            f"fma.rn.{fma} u, t, most, minus;",
            f"fma.rn.{fma} {pair}, u, none, t;",
        ]
    return lines


_E4M3_CONVERTED = ["mov.b32 {l, h}, $4;", "cvt.rn.f16x2.e4m3x2 p, l;", "cvt.rn.f16x2.e4m3x2 q, h;"]
_E4M3_FP16 = _e4m3_by_bits(7, "0xBF80BF80", "0x5C005C00", "0x58805880", "f16x2")
_E4M3_BF16 = _e4m3_by_bits(4, "0x87F087F0", "0x7B807B80", "0x7B107B10", "bf16x2")
_E5M2_FP16 = [f"prmt.b32 {pair}, $4, 0, {selector};" for pair, selector in zip("pq", _UPPER, strict=True)]
_INT8_FP16 = [
    "xor.b32 t, $4, 0x80808080;",
    "mov.b32 one, 0x3C003C00;",
    "mov.b32 minus, 0xE480E480;",
    f"prmt.b32 s, t, 0x64646464, {_LOWER[0]};",
    "fma.rn.f16x2 p, s, one, minus;",
    f"prmt.b32 s, t, 0x64646464, {_LOWER[1]};",
    "fma.rn.f16x2 q, s, one, minus;",
]
_INT8_BF16 = [
    "mov.b32 minus, 0xBF80BF80;",
    f"prmt.b32 s, $4, 0x43434343, {_LOWER[0]};",
    "and.b32 t, s, 0xFF7FFF7F;",
    "and.b32 u, s, 0xFF80FF80;",
    "fma.rn.bf16x2 p, u, minus, t;",
    f"prmt.b32 s, $4, 0x43434343, {_LOWER[1]};",
    "and.b32 t, s, 0xFF7FFF7F;",
    "and.b32 u, s, 0xFF80FF80;",
    "fma.rn.bf16x2 q, u, minus, t;",
]


@triton.jit
def code_value(code, CODE: tl.constexpr):
    """int32 codes 0..255 -> float32."""
    if CODE == E4M3:
        return e4m3_value(code)
    if CODE == E5M2:
        return e5m2_value(code)
    return ((code ^ 128) - 128).to(tl.float32)


@triton.jit
def _byte(words, J: tl.constexpr, factor, CODE: tl.constexpr, DTYPE: tl.constexpr):
    value = code_value((words >> (8 * J)) & 255, CODE)
    if factor is not None:
        value *= factor
    return value.to(DTYPE)


@triton.jit
def _assembled(words, factor, DTYPE: tl.constexpr, PROGRAM: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        if factor is None:
            return tl.inline_asm_elementwise(PROGRAM, _FOUR_OUT, [words], (tl.bfloat16,) * 4, is_pure=True, pack=1)
        else:
            both = [words, factor]
            return tl.inline_asm_elementwise(PROGRAM, _FOUR_OUT_SCALED, both, (tl.bfloat16,) * 4, is_pure=True, pack=1)
    else:
        if factor is None:
            return tl.inline_asm_elementwise(PROGRAM, _FOUR_OUT, [words], (tl.float16,) * 4, is_pure=True, pack=1)
        else:
            both = [words, factor]
            return tl.inline_asm_elementwise(PROGRAM, _FOUR_OUT_SCALED, both, (tl.float16,) * 4, is_pure=True, pack=1)


@triton.jit
def decode(words, factor, CODE: tl.constexpr, DTYPE: tl.constexpr, PROGRAM: tl.constexpr):
    """int32 words [...], a float32 factor of each [...] or None -> four tensors [...] in DTYPE, byte 0 first."""
    if PROGRAM == "":
        return (
            _byte(words, 0, factor, CODE, DTYPE), _byte(words, 1, factor, CODE, DTYPE),
            _byte(words, 2, factor, CODE, DTYPE), _byte(words, 3, factor, CODE, DTYPE),
        )  # fmt: skip
    else:
        return _assembled(words, factor, DTYPE, PROGRAM)
