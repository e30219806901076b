"""Small helpers of comfy_kitchen.float_utils: 4-bit packing, swizzled scales, powers of two as scales."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError, PartsError
from lowbit.layouts.scale_128x4 import swizzle, swizzled_shape, unswizzle
from lowbit.numerics import packing
from lowbit.numerics.floats import (
    E2M1_MAX,
    E4M3_MAX,
    E5M2_MAX,
    E8M0_BIAS,
    e2m1_values,
    e8m0_values,
)
from lowbit.numerics.groups import ceil_div, round_up

__all__ = [
    "E8M0_BIAS",
    "F4_E2M1_MAX",
    "F8_E4M3_MAX",
    "F8_E5M2_MAX",
    "ceil_div",
    "e8m0_to_f32",
    "f32_to_e8m0",
    "fp4_x2_to_f32",
    "from_blocked",
    "pack_uint4",
    "roundup",
    "swap_nibbles",
    "to_blocked",
    "unpack_uint4",
]

F4_E2M1_MAX = E2M1_MAX
F8_E4M3_MAX = E4M3_MAX
F8_E5M2_MAX = E5M2_MAX


def roundup(x: int, multiple: int) -> int:
    """The smallest multiple that is not below x."""
    return round_up(x, multiple)


def pack_uint4(uint8_data: Tensor, hi_first: bool = True) -> Tensor:
    """Codes uint8 [..., K], K even -> bytes [..., K/2]; `hi_first` puts the even column into the high nibble."""
    packed = packing.pack_nibbles(uint8_data)
    return packing.swap_nibbles(packed) if hi_first else packed


def unpack_uint4(uint8_data: Tensor, hi_first: bool = True) -> Tensor:
    """Bytes [..., P] -> codes uint8 [..., 2 P]; the inverse of `pack_uint4`."""
    raw = uint8_data.contiguous()
    return packing.unpack_nibbles(packing.swap_nibbles(raw) if hi_first else raw)


def swap_nibbles(packed: Tensor) -> Tensor:
    """Exchange the nibbles of every byte. Raises `PartsError` for other than one-byte elements."""
    if packed.dtype.itemsize != 1:
        raise PartsError(f"swap_nibbles takes packed bytes, not {str(packed.dtype).removeprefix('torch.')}")
    return packing.swap_nibbles(packed)


def to_blocked(input_matrix: Tensor, flatten: bool = True) -> Tensor:
    """Scales [H, W] in natural order -> tiles of 128 x 4, zeros added; flat, or in the padded shape."""
    tiles = swizzle(input_matrix)
    return tiles.flatten() if flatten else tiles


def from_blocked(blocked_matrix: Tensor, num_rows: int, num_cols: int) -> Tensor:
    """The inverse of `to_blocked`: scales [num_rows, num_cols]. Raises `PartsError` for another number of them."""
    shape = swizzled_shape(num_rows, num_cols)
    if blocked_matrix.numel() != shape[0] * shape[1]:
        raise PartsError(
            f"blocked scales have {blocked_matrix.numel()} elements, expected {shape[0] * shape[1]} for "
            f"{num_rows} x {num_cols} scales in tiles of 128 x 4"
        )
    return unswizzle(blocked_matrix.reshape(shape), num_rows, num_cols)


def fp4_x2_to_f32(a: Tensor, hi_first: bool = True) -> Tensor:
    """Bytes of two e2m1 codes [..., P] -> float32 values [..., 2 P]."""
    return e2m1_values(unpack_uint4(a, hi_first))


def f32_to_e8m0(x: Tensor) -> Tensor:
    """float32 -> uint8 exponents of the powers of two nearest to |x|, halves up; quantize_mxfp8 rounds up instead.

    Raises `FormatError` for another dtype.
    """
    if x.dtype != torch.float32:
        raise FormatError(f"f32_to_e8m0 takes float32, not {str(x.dtype).removeprefix('torch.')}")
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    return ((bits + (1 << 22)) >> 23).clamp_max(255).to(torch.uint8)  # a mantissa of a half or more carries over


def e8m0_to_f32(x: Tensor) -> Tensor:
    """float32 2 ** (code - 127) of uint8 (or float8_e8m0fnu) codes; 0 is 2**-127 and 255 NaN, as OCP MX says."""
    return e8m0_values(x.view(torch.uint8))
