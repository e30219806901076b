"""Group scales in tiles of 128 x 4, as block-scaled tensor-core instructions read them (cuBLAS SWIZZLE_32_4_4).

A scale matrix [H, W], one value a group of a weight's row, is padded with zeros to whole tiles. Inside a tile, which
takes 512 consecutive values, 16 of them stand for the rows r, r + 32, r + 64, r + 96 with their four columns each:

    offset(r, c) = ((r // 128) * ceil(W / 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4

The result has the padded shape, but that is only its size: rows and columns mean nothing any more. A matrix that needs
no padding has the same shape in both orders, so the order is always stated by whoever stores it and never guessed.
Source: cuBLAS documentation, section "1D block scaling factors layout"; comfy-kitchen `to_blocked`, torchao
`to_blocked`.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.parts import raw_bytes
from lowbit.numerics.groups import ceil_div, pad_to

ROWS, COLUMNS = 128, 4
_LANES = 32  # rows of a tile that follow each other 16 values apart


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of a swizzled scale matrix of `rows` x `columns` scales: the next multiples of 128 and 4."""
    return ceil_div(rows, ROWS) * ROWS, ceil_div(columns, COLUMNS) * COLUMNS


def swizzle(scale: Tensor) -> Tensor:
    """[H, W] of any dtype, in natural order -> [128 * ceil(H / 128), 4 * ceil(W / 4)] in tiles, zeros added.

    Raises `PartsError` for anything but a matrix.
    """
    if scale.dim() != 2:
        raise PartsError(f"a scale matrix to swizzle has shape {list(scale.shape)}, expected [rows, columns]")
    height, width = swizzled_shape(scale.shape[0], scale.shape[1])
    tiles = pad_to(raw_bytes(scale), height, width).reshape(height // ROWS, 4, _LANES, width // COLUMNS, COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width).view(scale.dtype)


def unswizzle(swizzled: Tensor, rows: int, columns: int, where: str = "scale") -> Tensor:
    """The inverse of `swizzle`: the [rows, columns] scales in natural order. The padding is dropped whatever it holds.

    Raises `PartsError`, naming `where`, when the shape is not that of this many scales.
    """
    height, width = swizzled_shape(rows, columns)
    if tuple(swizzled.shape) != (height, width):
        raise PartsError(
            f"{where}: swizzled scales have shape {list(swizzled.shape)}, expected {[height, width]} "
            f"for {rows} x {columns} groups; scales in natural order are to be passed through swizzle first"
        )
    tiles = raw_bytes(swizzled).reshape(height // ROWS, width // COLUMNS, _LANES, 4, COLUMNS)
    natural = tiles.permute(0, 3, 2, 1, 4).reshape(height, width)[:rows, :columns]
    return natural.contiguous().view(swizzled.dtype)
