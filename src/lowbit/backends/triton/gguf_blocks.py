"""The blocks of GGUF files inside kernels: some bytes of codes at a time, as float32, in ggml's arithmetic.

`lowbit.numerics.gguf_blocks` says where codes lie; this file takes that from there, and adds how a header is read. A
unit is 8 or 16 bytes (`LANES`) of a block's main field. The codes that these hold at one place of a byte, a piece,
belong to as many columns side by side, which share a step; a unit of 4-bit codes has two pieces.

Blocks have 17 to 210 bytes and are not padded: how wide a load may be follows from the size of the block, which the
compiler knows. Every product and sum is rounded on its own, as ggml does it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.gguf_blocks import Field, block_type

_MAGIC = tl.constexpr(8388608.0)  # 2**23: the mantissa of a float32 of this size counts in ones
UNSIGNED, SIGNED, E2M1 = (tl.constexpr(i) for i in range(3))  # what codes are
# What headers are.
HALF, TWO_HALVES, SIX_BITS, FOUR_BITS, BYTES, POWER, E4M3, SIGNED_SIX_BITS = (tl.constexpr(i) for i in range(8))

# Of each type: its codes, its header, and where in a block the float16 scales and the scales of groups begin.
_READ = {
    "Q4_0": (UNSIGNED, HALF, 0, 0),
    "Q4_1": (UNSIGNED, TWO_HALVES, 0, 0),
    "Q5_0": (UNSIGNED, HALF, 0, 0),
    "Q5_1": (UNSIGNED, TWO_HALVES, 0, 0),
    "Q8_0": (SIGNED, HALF, 0, 0),
    "Q2_K": (UNSIGNED, FOUR_BITS, 80, 0),
    "Q3_K": (UNSIGNED, SIGNED_SIX_BITS, 108, 96),
    "Q4_K": (UNSIGNED, SIX_BITS, 0, 4),
    "Q5_K": (UNSIGNED, SIX_BITS, 0, 4),
    "Q6_K": (UNSIGNED, BYTES, 208, 192),
    "MXFP4": (E2M1, POWER, 0, 0),
    "NVFP4": (E2M1, E4M3, 0, 0),
}
TYPES = tuple(_READ)


class Kind(NamedTuple):
    """What the compiler knows of a type: a block has `size` bytes and `columns`, of which `group` share a step."""

    size: int
    columns: int
    group: int
    start: int
    """Where the main field begins: codes of `bits`, each place of a byte for `run` columns in a row."""
    bits: int
    run: int
    upper: int
    """Where the field of the upper bits begins, in the same way `upper_bits` (0 where there is none), `upper_run`."""
    upper_bits: int
    upper_run: int
    codes: int
    zero_code: int
    """The code of level 0."""
    header: int
    halves: int
    scales: int


def kind_of(name: str) -> Kind:
    """The `Kind` of one of `TYPES`."""
    block = block_type(name)
    main, upper = (*block.fields, Field(0, 0, 0, 0))[:2]
    codes, header, halves, scales = _READ[name]
    return Kind(
        block.size, block.columns, block.unit, main.start, main.bits, main.run, upper.start, upper.bits, upper.run,
        codes.value, block.offset, header.value, halves, scales,
    )  # fmt: skip


def held(kind: Kind) -> int:
    """The bytes of codes in the main field of a block."""
    return kind.columns * kind.bits // 8


def views(qdata: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """The blocks as bytes and, where every block begins at an even address, as int16: what the kernels read."""
    even = kind.size % 2 == qdata.storage_offset() % 2 == 0 and (qdata.is_meta or qdata.data_ptr() % 2 == 0)
    return qdata, qdata.view(torch.int16) if even else None


@triton.jit
def _at(offset, LANES: tl.constexpr):
    """[...] -> [..., LANES]: as many places from an offset on."""
    return tl.expand_dims(offset, len(offset.shape)) + tl.arange(0, LANES)


@triton.jit
def _wide(value):
    """[...] -> [..., 1]."""
    return tl.expand_dims(value, len(value.shape))


@triton.jit
def _byte(raw, offset, inside):
    """The byte at each offset, int32; 0 outside."""
    if inside is None:
        return tl.load(raw + offset).to(tl.int32)
    else:
        return tl.load(raw + offset, mask=inside, other=0).to(tl.int32)


@triton.jit
def _half(raw, halves, block, inside, OFFSET: tl.constexpr, KIND: tl.constexpr):
    """The float16 that lies OFFSET bytes behind the beginning of each block, float32."""
    if halves is None:
        at = block * KIND.size + OFFSET
        bits = (_byte(raw, at, inside) | (_byte(raw, at + 1, inside) << 8)).to(tl.int16)
    else:
        at = block * (KIND.size // 2) + OFFSET // 2
        bits = tl.load(halves + at) if inside is None else tl.load(halves + at, mask=inside, other=0)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_and_minimum(raw, block, group, inside, KIND: tl.constexpr):
    """The integers of each group that two float16 are multiplied by: two nibbles of a byte, or six bits each."""
    at = block * KIND.size + KIND.scales
    if KIND.header == FOUR_BITS:
        both = _byte(raw, at + group, inside)
        scale, least = both & 15, both >> 4
    else:  # four bytes of scales, four of minima, and four whose nibbles go with the upper two bits of those
        place = at + group % 4
        low_scale, low_least = _byte(raw, place, inside), _byte(raw, place + 4, inside)
        both = _byte(raw, place + 8, inside)
        early = group < 4
        scale = tl.where(early, low_scale & 63, (both & 15) | ((low_scale >> 2) & 48))
        least = tl.where(early, low_least & 63, (both >> 4) | ((low_least >> 2) & 48))
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit
def _step(raw, halves, block, group, inside, KIND: tl.constexpr):
    """The step of a group of columns of each block, float32."""
    at = block * KIND.size + KIND.scales
    if KIND.header == POWER:  # 2**(code - 128), of which the two smallest are subnormal
        code = _byte(raw, at, inside)
        step = tl.where(code < 2, 0x200000 << tl.minimum(code, 1), (code - 1) << 23).to(tl.float32, bitcast=True)
    elif KIND.header == E4M3:  # half of it, without the sign; the code of NaN is zero
        code = _byte(raw, at + group, inside)
        step = ((code & 127) << 20).to(tl.float32, bitcast=True) * 6.64613997892458e35  # 2**119
        step = tl.where(code == 127, 0.0, step)
    else:
        step = _half(raw, halves, block, inside, KIND.halves, KIND)
        if KIND.header == SIX_BITS or KIND.header == FOUR_BITS:  # noqa: PLR1714  (Triton knows no `in`)
            step *= _scale_and_minimum(raw, block, group, inside, KIND)[0]
        elif KIND.header == SIGNED_SIX_BITS:  # nibbles of eight bytes, then the upper two bits of four; 32 means 0
            low = _byte(raw, at + group % 8, inside) >> (group // 8 * 4)
            high = _byte(raw, at + 8 + group % 4, inside) >> (group // 4 * 2)
            step *= (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)
        elif KIND.header == BYTES:
            step *= ((_byte(raw, at + group, inside) ^ 128) - 128).to(tl.float32)
    return step


@triton.jit
def _zero(raw, halves, block, group, inside, KIND: tl.constexpr):
    """What is added to a group of columns of each block, float32."""
    least = _half(raw, halves, block, inside, KIND.halves + 2, KIND)
    if KIND.header != TWO_HALVES:
        least = -(least * _scale_and_minimum(raw, block, group, inside, KIND)[1])
    return least


@triton.jit
def _level(code, KIND: tl.constexpr):
    """What int32 codes stand for: float32, exact."""
    if KIND.codes == E2M1:  # doubled; a negative zero is a positive one. 2**127 is the difference of the biases, and 2
        size = ((code & 7) << 22).to(tl.float32, bitcast=True) * 1.7014118346046923e38
        return tl.where(code > 7, 0.0 - size, size)
    elif KIND.codes == SIGNED:
        return ((code ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - (_MAGIC + 128.0)
    else:
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (_MAGIC + KIND.zero_code)


@triton.jit
def column_of(byte, PIECE: tl.constexpr, KIND: tl.constexpr):
    """The column of a block to which a place of a byte of the main field belongs; `byte` counts from its beginning."""
    span: tl.constexpr = KIND.run * (8 // KIND.bits)
    return byte // KIND.run * span + (PIECE * KIND.run + byte % KIND.run)


@triton.jit
def load_unit(raw, block, byte, inside, LANES: tl.constexpr, KIND: tl.constexpr):
    """The bytes from `byte` of the main field on, of each block: uint8 [..., LANES]."""
    at = raw + _at(block * KIND.size + (KIND.start + byte), LANES)
    if inside is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=_wide(inside), other=0)


@triton.jit
def _upper_bits(raw, block, column, inside, LANES: tl.constexpr, KIND: tl.constexpr):
    """The upper bits of the codes of the columns from `column` on, where they belong: int32 [..., LANES]."""
    at = block * KIND.size + KIND.upper
    mask: tl.constexpr = (1 << KIND.upper_bits) - 1
    per_byte: tl.constexpr = 8 // KIND.upper_bits
    if KIND.upper_run == 1:  # side by side: all of a unit in one byte, or two
        tl.static_assert(KIND.upper_bits == 1)
        found = _byte(raw, at + column // 8, inside)
        if LANES == 16:
            found |= _byte(raw, at + (column // 8 + 1), inside) << 8
        bits = _wide(found) >> tl.arange(0, LANES)
    else:
        first = at + (column // (KIND.upper_run * per_byte) * KIND.upper_run + column % KIND.upper_run)
        found = _byte(raw, _at(first, LANES), None if inside is None else _wide(inside))
        bits = found >> _wide(column // KIND.upper_run % per_byte * KIND.upper_bits)
    return (bits & mask) << KIND.bits


@triton.jit
def values(
    raw, halves, packed, block, byte, inside, PIECE: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """The weights of a piece of what `load_unit` gave: float32 [..., LANES], of the columns from `column_of` on.

    block, byte: int32 [...]. Outside, where `inside` is given, all of them are zero.
    """
    column = column_of(byte, PIECE, KIND)
    code = (packed.to(tl.int32) >> (PIECE * KIND.bits)) & ((1 << KIND.bits) - 1)
    if KIND.upper_bits > 0:
        code |= _upper_bits(raw, block, column, inside, LANES, KIND)
    group = column // KIND.group
    value = _level(code, KIND) * _wide(_step(raw, halves, block, group, inside, KIND))
    if KIND.header == TWO_HALVES or KIND.header == SIX_BITS or KIND.header == FOUR_BITS:  # noqa: PLR1714
        value += _wide(_zero(raw, halves, block, group, inside, KIND))
    return value
