"""refit_unit for narrow units of one row: sums and decisions in C++, what can be stored by the format in between.

Sums have another order than eager's.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.backends.cpu.operands import address
from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid

WIDEST = 256  # columns of a unit, and of the block it is in: beyond, a matrix product is worth its price


def refuses(grid: Grid, start: int, stop: int, slope: Tensor, inner: Tensor, first: int, values: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if grid.rows != 1:
        return f"units of {grid.rows} rows; the kernel takes those of one row"
    if slope.shape[0] > WIDEST:
        return f"{slope.shape[0]} columns at once; the kernel takes at most {WIDEST}"
    return grid_columns.refuses(grid, (slope, values), inner)


@kernel("refit_unit", backend="cpu", refuses=refuses, tolerance=1e-3)
def refit_unit(grid: Grid, start: int, stop: int, slope: Tensor, inner: Tensor, first: int, values: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    module, threads = native.module(), native.threads()
    (block, n), count, place = slope.shape, stop - start, start // grid.columns
    terms = slope.new_empty((6, n))
    step, divisor = grid.step[place : place + 1], grid.divisor[place : place + 1]
    zero = None if grid.zero is None else grid.zero[place : place + 1]
    levels = grid_columns.describe(grid)[3:]
    where = (step.data_ptr(), divisor.data_ptr(), address(zero))
    unit = (start - first, count, block, n, slope.data_ptr(), inner.data_ptr(), *inner.stride())
    rest = (values[start].data_ptr(), terms.data_ptr(), threads)
    module.refit_propose(*where, *levels, *unit, *rest)
    stored, stored_zero = grid.snapped(slice(place, place + 1), terms[:1], None if zero is None else terms[1:2])
    stored, stored_zero = stored.contiguous(), None if stored_zero is None else stored_zero.contiguous()
    module.refit_apply(*where, *levels, stored.data_ptr(), address(stored_zero), *unit, *rest)
