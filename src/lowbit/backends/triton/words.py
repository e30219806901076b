"""Eight codes of 4 bits in a word, as eight tensors of exact floats: what the kernels over the layout words128 share.

`decode` gives nibble j of every word as value j: a signed integer -8..7 (the code minus 8), or an e2m1 value. Both are
exact in bfloat16 and float16. On NVIDIA GPUs it is PTX that makes two values in one register at a time: a nibble is
masked into the mantissa of a float whose last bit is worth 1, and that float is subtracted; the bits of e2m1 are put
where the exponent and the first mantissa bit are, and the product with a power of two makes them normal numbers, which
a caller that multiplies by a scale can leave to that (`TINY_E2M1`).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTEGERS = tl.constexpr(0)
E2M1 = tl.constexpr(1)
TINY_E2M1 = tl.constexpr(2)  # e2m1 values times 2**-126 in bfloat16, 2**-14 in float16: their bits, moved and no more

# Two words in ($8, $9), eight pairs of values out. The pairs of nibbles 0..3 come from the low halves of both words,
# those of 4..7 from the high halves.
_SPREAD = """
prmt.b32 p, $8, $9, 0x5410;
prmt.b32 q, $8, $9, 0x7632;
"""


def _integers_bf16() -> str:
    """PTX that ors each nibble into the mantissa of 128, whose last bit is worth 1, and subtracts 136."""
    lines = [_SPREAD, "mov.b32 one, 0x3F803F80;", "mov.b32 minus, 0xC308C308;"]
    for j in range(8):
        source, shift = ("p", 4 * j) if j < 4 else ("q", 4 * j - 16)
        if shift:
            lines.append(f"shr.u32 t, {source}, {shift};")
        lines.append(f"lop3.b32 t, {'t' if shift else source}, 0x000F000F, 0x43004300, 0xEA;")
        lines.append(f"fma.rn.bf16x2 ${j}, t, one, minus;")
    return "{\n.reg .b32 p, q, t, one, minus;\n" + "\n".join(lines) + "\n}"


def _integers_fp16() -> str:
    """The same for float16, whose mantissa holds two nibbles: the second is worth 16 times itself, without a shift."""
    lines = [_SPREAD, "mov.b32 one, 0x3C003C00;", "mov.b32 part, 0x2C002C00;"]  # 1, 1/16
    lines += ["mov.b32 minus, 0xE408E408;", "mov.b32 less, 0xD480D480;"]  # -(1024 + 8), -(1024 / 16 + 8)
    for j in range(8):
        source = "p" if j < 4 else "q"
        if j % 4 == 2:
            lines.append(f"shr.u32 {source}, {source}, 8;")
        mask = "0x00F000F0" if j % 2 else "0x000F000F"
        lines.append(f"lop3.b32 t, {source}, {mask}, 0x64006400, 0xEA;")
        lines.append(f"fma.rn.f16x2 ${j}, t, {'part, less' if j % 2 else 'one, minus'};")
    return "{\n.reg .b32 p, q, t, one, part, minus, less;\n" + "\n".join(lines) + "\n}"


def _e2m1(places: int, scale: str | None, fma: str) -> str:
    """PTX that puts the code of each nibble where it is a float, and multiplies by `scale` where that is wanted.

    A permutation takes a byte of both words and repeats its sign, the sign of its high nibble, in the byte above, so
    that one shift and one mask put all four bits in place.
    """
    mask = 0x8000 | 0x7 << places
    lines = ["mov.b32 c, $8;", "mov.b32 d, $9;", "shl.b32 a, c, 4;", "shl.b32 b, d, 4;"]
    if scale:
        lines += [f"mov.b32 scale, {scale};", "mov.b32 zero, 0x80008000;"]
    for j in range(8):
        byte = j // 2
        low, high = ("c", "d") if j % 2 else ("a", "b")
        lines.append(f"prmt.b32 t, {low}, {high}, 0x{0xC480 + 0x1111 * byte:X};")
        lines.append(f"shl.b32 t, t, {places - 4};")
        lines.append(f"and.b32 {'t' if scale else f'${j}'}, t, 0x{mask:04X}{mask:04X};")
        if scale:
            lines.append(f"fma.rn.{fma} ${j}, t, scale, zero;")
    return "{\n.reg .b32 a, b, c, d, t, scale, zero;\n" + "\n".join(lines) + "\n}"


# The float 128 of bfloat16 has steps of 1, and so has 1024 of float16. The exponent biases are 1 of e2m1, 127 of
# bfloat16, 15 of float16.
BF16 = (_integers_bf16(), _e2m1(6, "0x7E807E80", "bf16x2"), _e2m1(6, None, "bf16x2"))
FP16 = (_integers_fp16(), _e2m1(9, "0x74007400", "f16x2"), _e2m1(9, None, "f16x2"))
_BF16 = tl.constexpr(BF16)  # by kind of code
_FP16 = tl.constexpr(FP16)
_EIGHT_OUT = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r")


@triton.jit
def _assembled(words, CODE: tl.constexpr, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        ptx: tl.constexpr = _BF16[CODE]
        return tl.inline_asm_elementwise(ptx, _EIGHT_OUT, [words], (tl.bfloat16,) * 8, is_pure=True, pack=2)
    else:
        half: tl.constexpr = _FP16[CODE]
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
    tl.static_assert(CODE != TINY_E2M1, "only the assembly makes these")
    if CODE == E2M1:
        return e2m1_value(code).to(DTYPE)
    return (code - 8).to(tl.float32).to(DTYPE)


@triton.jit
def decode(words, CODE: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLE: tl.constexpr):
    """int32 words [...] -> eight tensors [...] in DTYPE, nibble 0 first."""
    if ASSEMBLE:
        return _assembled(words, CODE, DTYPE)
    else:  # not after it: Triton compiles what stands behind a return, too
        return (
            nibble_value(words & 15, CODE, DTYPE), nibble_value((words >> 4) & 15, CODE, DTYPE),
            nibble_value((words >> 8) & 15, CODE, DTYPE), nibble_value((words >> 12) & 15, CODE, DTYPE),
            nibble_value((words >> 16) & 15, CODE, DTYPE), nibble_value((words >> 20) & 15, CODE, DTYPE),
            nibble_value((words >> 24) & 15, CODE, DTYPE), nibble_value((words >> 28) & 15, CODE, DTYPE),
        )  # fmt: skip
