"""Where a program's tile of groups along K lies, and its values, after an activation if one is asked for."""

from __future__ import annotations

import triton
import triton.language as tl

GELU, GELU_TANH, SWIGLU = tl.constexpr("gelu"), tl.constexpr("gelu_tanh"), tl.constexpr("swiglu")


@triton.jit
def place(n, k, group, across, EVEN: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Rows [ROWS, 1, 1] int64, groups [1, GROUPS, 1], columns [1, GROUPS, SIZE], and which values lie within.

    group: columns of one; SIZE: a power of two that holds them. EVEN: groups are whole.
    """
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    index = (tl.program_id(0) % across) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    inner = tl.arange(0, SIZE)[None, None, :]
    column = index * group + inner
    if EVEN:  # whole groups are in or out, so that loads need not look at single values
        inside = (row < n) & (index * group < k) & (inner < SIZE)
    else:
        inside = (row < n) & (column < k) & (inner < group)
    return row, index, column, inside


@triton.jit
def sigmoid(value):
    """1 / (1 + e**-value), of no power that could overflow."""
    power = tl.exp(-tl.abs(value))
    return tl.where(value < 0.0, power, 1.0) / (1.0 + power)


@triton.jit
def load(at, up, inside, ACTIVATION: tl.constexpr):
    """Values as float32; with an activation, of what it gives, rounded to the dtype of x as a kernel of its own does.

    up: for swiglu, pointers to the values that SiLU of those at `at` is multiplied by.
    """
    loaded = tl.load(at, mask=inside, other=0.0)
    value = loaded.to(tl.float32)
    if ACTIVATION is None:
        return value
    else:
        if ACTIVATION == GELU:
            value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        elif ACTIVATION == GELU_TANH:
            value = value * sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
        else:
            value = value * sigmoid(value) * tl.load(up, mask=inside, other=0.0).to(tl.float32)
        return value.to(loaded.dtype).to(tl.float32)


@triton.jit
def swizzled(row, group, groups):
    """Offsets of scales in the layout `scale_128x4`; groups: of a row."""
    tile = (row // 128) * ((groups + 3) // 4) + group // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
