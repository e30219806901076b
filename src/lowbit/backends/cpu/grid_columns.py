"""What the kernels that round columns are told of a grid (struct ColumnGrid of native/grid_columns.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu.operands import address
from lowbit.formats.grid import Grid
from lowbit.numerics.levels import MAGIC, FloatLevels, IntegerLevels

CACHED_COLUMNS = 512  # so many have an H that stays in the second cache for all rows
# Values of more columns: beyond, to read H for every piece of rows costs more than a matrix product saves. Measured at
# 1536 and 3072 columns, on one thread and on two.
MOST_VALUES, MOST_REFITTED = 1 << 18, 1 << 20
GridFields = tuple[int, int, int, int, bool, float, float, float, float]


def refuses(grid: Grid, rows: tuple[Tensor, ...], inner: Tensor) -> str | None:
    """Why the kernels cannot round to this grid, or do so between these tensors, or None."""
    if type(grid) is not Grid or not isinstance(grid.levels, IntegerLevels | FloatLevels):
        return "the grid has a rounding of its own; the kernels round to integers and to floating-point values"
    tensors = (grid.target, grid.step, grid.divisor, *rows)
    if grid.zero is not None:
        tensors = (*tensors, grid.zero)
    if any(x.dtype != torch.float32 for x in (*tensors, inner)):
        return "not everything is float32"
    if not all(x.is_contiguous() for x in tensors):
        return "not all rows are without gaps"
    return None


def in_blocks(values: Tensor, *, refits: bool = False) -> bool:
    """Whether matrix products between blocks of columns are faster for values [K, n] than going through all at once."""
    k, n = values.shape
    return k > CACHED_COLUMNS and n * k > (MOST_REFITTED if refits else MOST_VALUES)


def describe(grid: Grid) -> GridFields:
    """The first arguments of the kernels."""
    place = (grid.step.data_ptr(), grid.divisor.data_ptr(), address(grid.zero), grid.columns)
    levels = grid.levels
    if isinstance(levels, FloatLevels):
        smallest, magic = 2.0**levels.min_exponent, MAGIC * 2.0**-levels.mantissa
        return *place, True, -levels.largest, levels.largest, smallest, magic
    assert isinstance(levels, IntegerLevels)
    return *place, False, float(levels.low), float(levels.high), 0.0, 0.0
