"""Eight codes of 4 bits in a word, as eight tensors of exact floats: what the kernels over the layout words128 share.

`decode` gives nibble j of every word as value j: a signed integer -8..7 (the code minus 8), or an e2m1 value. Both are
exact in bfloat16 and float16. On NVIDIA GPUs it is PTX that makes two values in one register at a time: a nibble is
masked into the mantissa of a float whose last bit is worth 1, and that float is subtracted; the bits of e2m1 are put
where the exponent and the first mantissa bit are, and the product with a power of two makes them normal numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTEGERS = tl.constexpr(0)
E2M1 = tl.constexpr(1)

# Two words in ($8, $9), eight pairs of values out. The pairs of nibbles 0..3 come from the low halves of both words,
# those of 4..7 from the high halves.
_SPREAD = """
prmt.b32 p, $8, $9, 0x5410;
prmt.b32 q, $8, $9, 0x7632;
"""


def _integers(bias: str, one: str, minus: str, fma: str) -> str:
    """PTX that ors each nibble into the mantissa of `bias` and adds `minus`, the float -(bias + 8)."""
    lines = [_SPREAD, f"mov.b32 one, {one};", f"mov.b32 minus, {minus};"]
    for j in range(8):
        source, shift = ("p", 4 * j) if j < 4 else ("q", 4 * j - 16)
        if shift:
            lines.append(f"shr.u32 t, {source}, {shift};")
        lines.append(f"lop3.b32 t, {'t' if shift else source}, 0x000F000F, {bias}, 0xEA;")
        lines.append(f"fma.rn.{fma} ${j}, t, one, minus;")
    return "{\n.reg .b32 p, q, t, one, minus;\n" + "\n".join(lines) + "\n}"


def _e2m1(places: int, scale: str, fma: str) -> str:
    """PTX that moves bits 0..2 of each nibble up by `places` and bit 3 to the sign, and multiplies by `scale`."""
    low = 0x7 << places
    lines = [_SPREAD, f"mov.b32 scale, {scale};", "mov.b32 zero, 0x80008000;"]
    for j in range(8):
        source, at = ("p", 4 * j) if j < 4 else ("q", 4 * j - 16)
        lines.append(_shifted("t", source, places - at))
        lines.append(_shifted("s", source, 12 - at))
        lines.append(f"and.b32 t, t, 0x{low:04X}{low:04X};")
        lines.append("lop3.b32 t, s, 0x80008000, t, 0xEA;")
        lines.append(f"fma.rn.{fma} ${j}, t, scale, zero;")
    return "{\n.reg .b32 p, q, s, t, scale, zero;\n" + "\n".join(lines) + "\n}"


def _shifted(to: str, source: str, left: int) -> str:
    op = "shl.b32" if left >= 0 else "shr.u32"
    return f"{op} {to}, {source}, {abs(left)};"


# The float 128 of bfloat16 has steps of 1, and so has 1024 of float16. The exponent biases are 1 of e2m1, 127 of
# bfloat16, 15 of float16.
_INTEGERS_BF16 = tl.constexpr(_integers("0x43004300", "0x3F803F80", "0xC308C308", "bf16x2"))
_INTEGERS_FP16 = tl.constexpr(_integers("0x64006400", "0x3C003C00", "0xE408E408", "f16x2"))
_E2M1_BF16 = tl.constexpr(_e2m1(6, "0x7E807E80", "bf16x2"))
_E2M1_FP16 = tl.constexpr(_e2m1(9, "0x74007400", "f16x2"))
_EIGHT_OUT = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r")


@triton.jit
def _assembled(words, CODE: tl.constexpr, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        ptx: tl.constexpr = _E2M1_BF16 if CODE == E2M1 else _INTEGERS_BF16
        return tl.inline_asm_elementwise(ptx, _EIGHT_OUT, [words], (tl.bfloat16,) * 8, is_pure=True, pack=2)
    else:
        half: tl.constexpr = _E2M1_FP16 if CODE == E2M1 else _INTEGERS_FP16
        return tl.inline_asm_elementwise(half, _EIGHT_OUT, [words], (tl.float16,) * 8, is_pure=True, pack=2)


@triton.jit
def e2m1_value(code):
    """int32 codes 0..15 -> float32."""
    magnitude = (((code & 7) << 22) + (126 << 23)).to(tl.float32, bitcast=True)  # right but for 0 and 0.5
    exponent = (code >> 1) & 3
    low = (code & 1).to(tl.float32) * 0.5
    value = tl.where(exponent == 0, low, magnitude)
    return tl.where(code >= 8, -value, value)


@triton.jit
def nibble_value(code, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """int32 codes 0..15 -> what they stand for in DTYPE: code - 8, or the e2m1 value."""
    if CODE == E2M1:
        return e2m1_value(code).to(DTYPE)
    return (code - 8).to(tl.float32).to(DTYPE)


@triton.jit
def decode(words, CODE: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLE: tl.constexpr):
    """int32 words [...] -> eight tensors [...] in DTYPE, nibble 0 first."""
    if ASSEMBLE:
        return _assembled(words, CODE, DTYPE)
    return (
        nibble_value(words & 15, CODE, DTYPE), nibble_value((words >> 4) & 15, CODE, DTYPE),
        nibble_value((words >> 8) & 15, CODE, DTYPE), nibble_value((words >> 12) & 15, CODE, DTYPE),
        nibble_value((words >> 16) & 15, CODE, DTYPE), nibble_value((words >> 20) & 15, CODE, DTYPE),
        nibble_value((words >> 24) & 15, CODE, DTYPE), nibble_value((words >> 28) & 15, CODE, DTYPE),
    )  # fmt: skip
