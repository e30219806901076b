"""Scales of one byte as floats of 16 bits, by PTX that takes four bytes in a register: e4m3 and e8m0 codes.

`floats` has the same in Triton's own words, one value at a time; Triton then moves the bytes to the threads that
multiply before it converts them, so that four threads convert the same ones. It does not move PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_BF16_RAISED = 119  # the power of two that e4m3 scales come with in bfloat16, and
E4M3_FP16_RAISED = 7  # in float16: nearly the largest that 448 can be multiplied by

# Four bytes in $2 become the upper halves of four lanes of 16 bits; two registers out.
_LANES = ("0x1404", "0x3424")


def _program(registers: str, constants: str, lane: str) -> str:
    lines = [f".reg .b32 h, nil, {registers};", "mov.b32 h, $2;", "mov.b32 nil, 0;", constants]
    for out, bytes_of in enumerate(_LANES):
        lines += [f"prmt.b32 t, h, nil, {bytes_of};", lane.replace("OUT", f"${out}")]
    return "{\n" + "\n".join(lines) + "\n}"


# Exponent and mantissa are moved to their places, which makes the value times 2**-120 (2**-8 in float16). The largest
# magnitude is NaN: only adding one to it reaches the next bit, which is spread over the rest of the exponent.
E4M3_BF16 = _program(
    "t, s, n, zero, first, second",
    "mov.b32 zero, 0x80008000; mov.b32 first, 0x7B807B80; mov.b32 second, 0x7B007B00;",  # -0, 2**120, 2**119
    """and.b32 s, t, 0x80008000;
shr.u32 t, t, 4;
and.b32 t, t, 0x07F007F0;
add.u32 n, t, 0x00100010;
and.b32 n, n, 0x08000800;
mul.lo.u32 n, n, 15;
lop3.b32 t, t, s, n, 0xFE;
fma.rn.bf16x2 t, t, first, zero;
fma.rn.bf16x2 OUT, t, second, zero;""",
)
E4M3_FP16 = _program(
    "t, s, n, zero, first",
    "mov.b32 zero, 0x80008000; mov.b32 first, 0x78007800;",  # -0, 2**15
    """and.b32 s, t, 0x80008000;
shr.u32 t, t, 1;
and.b32 t, t, 0x3F803F80;
add.u32 n, t, 0x00800080;
and.b32 n, n, 0x40004000;
lop3.b32 t, t, s, n, 0xFE;
fma.rn.f16x2 OUT, t, first, zero;""",
)
# The code is the exponent. 0 is 2**-127, the upper bit of a subnormal mantissa; 255 would be infinite, and is NaN.
E8M0_BF16 = _program(
    "t, n, low",
    "mov.b32 low, 0x00400040;",
    """shr.u32 t, t, 1;
and.b32 t, t, 0x7F807F80;
add.u32 n, t, 0x00800080;
and.b32 n, n, 0x80008000;
shr.u32 n, n, 9;
max.bf16x2 t, t, low;
or.b32 OUT, t, n;""",
)
_E4M3_BF16, _E4M3_FP16, _E8M0_BF16 = tl.constexpr(E4M3_BF16), tl.constexpr(E4M3_FP16), tl.constexpr(E8M0_BF16)
_TWO_OUT = tl.constexpr("=r,=r,r")


@triton.jit
def e4m3_raised(codes, DTYPE: tl.constexpr):
    """uint8 codes -> their values times 2**119 in bfloat16, or times 2**7 in float16. On NVIDIA GPUs alone."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(_E4M3_BF16, _TWO_OUT, [codes], tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(_E4M3_FP16, _TWO_OUT, [codes], tl.float16, is_pure=True, pack=4)


@triton.jit
def e8m0_bf16(codes):
    """uint8 codes -> their powers of two in bfloat16. On NVIDIA GPUs alone."""
    return tl.inline_asm_elementwise(_E8M0_BF16, _TWO_OUT, [codes], tl.bfloat16, is_pure=True, pack=4)
