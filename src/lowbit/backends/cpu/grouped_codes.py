"""Products with 4- or 8-bit codes in groups along K, in the layout rows16: what awq_w4a16 and wna16 share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, Operands
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16
from lowbit.numerics import w4a8

INT16, REGISTERS, PANELS, INT8 = range(4)  # enum Way of linear_grouped_codes.cpp
NO_ZEROS, CODES, VALUES, FLOAT_CODES = range(4)  # enum Zeros of native/grouped_codes.h
# Up to how many float32 tokens decoding in registers is faster than panels, by bits: measured on AVX2 for 4 bits, taken
# over for 8. Tokens of 16 bits are integers always, which is the faster way for any number of them.
_FEW_FLOAT32 = {4: 16, 8: 16}
_MOST_COLUMNS = {INT16: 128, INT8: w4a8.BLOCK}  # that share a scale of the activations
_SIZES = {4: 8, 8: 4}  # columns in a word


@functools.cache
def refuses_group(group: int, bits: int) -> str | None:
    """Why groups of so many columns cannot be multiplied, or None."""
    columns = _SIZES[bits]
    if group % columns:
        return f"groups of {group} columns; the kernel takes multiples of {columns}, as a word has"
    return None


@functools.cache
def integer_block(group: int, bits: int, way: int) -> int:
    """How many columns of the activations share a scale: a divisor of the group that a kernel sums in one go."""
    step = _SIZES[bits]
    first = min(group, _MOST_COLUMNS.get(way, group)) // step * step
    sizes = [size for size in range(first, 0, -step) if group % size == 0]
    return next((size for size in sizes if size % 32 == 0), sizes[0])


def linear(
    fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, bits: int, group: int, kind: int, *, int8: bool
) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x.

    int8: activations are rounded to 8 bits.
    """
    words, scale = parts["qdata"], parts["scale"]
    zeros = 0 if kind == NO_ZEROS else parts["zero_point" if kind == CODES else "zero"].data_ptr()
    operands = Operands(x, rows16.rows(fmt, parts), bias)
    floats = REGISTERS if operands.m <= _FEW_FLOAT32[bits] else PANELS
    way = INT8 if int8 else floats if x.dtype == torch.float32 else INT16
    native.module().linear_grouped_codes(
        *operands.rows, words.data_ptr(), words.shape[1], bits, scale.data_ptr(), DTYPES[scale.dtype], zeros, kind,
        group, integer_block(group, bits, way), *operands.bias_out, way, native.threads(),
    )  # fmt: skip
    return operands.out
