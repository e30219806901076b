"""Rounding columns one after the other, by the kernels of their device: what gptq and descent are made of.

gptq_sweep and descent_sweep go through all columns of some rows; gptq_columns, descent_columns and refit_unit are their
parts, a block of columns at a time, between which many rows are worth matrix products.

Functions and not operators: none of them is traced. Tensors are float32 and transposed, as in `formats.grid`: [c, n]
for c columns of n rows. They are written over in place.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import ANY_FORMAT, select
from lowbit.formats.grid import Grid

WIDEST = 256  # a unit of more columns is not refitted within a sweep, but by itself


def gptq_sweep(grid: Grid, order: Tensor, lower: Tensor, values: Tensor) -> None:
    """Round all columns of a grid, the last one of an order first, each made up for by those before it.

    order   int64 [K]   the columns
    lower   [K, K]      the factor L of H in that order, unit lower triangular
    values  [K, n]      what they are rounded to is written here, in the order of the file
    """
    args = (grid, order, lower, values)
    select("gptq_sweep", ANY_FORMAT, "", values.device.type, args).run(*args)


def descent_sweep(
    grid: Grid, values: Tensor, gradient: Tensor, hessian: Tensor, *, codes: bool, scales: bool, last: bool
) -> None:
    """Go through all columns of a grid: move each code to its best value, refit each unit's step (and zero), or both.

    values    [K, n]   what the codes stand for; becomes what they then stand for
    gradient  [K, n]   H (target - values), kept up to date; `last`: it is of no use afterwards
    hessian   [K, K]   H

    `scales` only where units have at most WIDEST columns. Neither `codes` nor `scales`: nothing.
    """
    if not codes and not scales:
        return
    args = (grid, values, gradient, hessian, codes, scales, last)
    select("descent_sweep", ANY_FORMAT, "", values.device.type, args).run(*args)


def gptq_columns(grid: Grid, columns: Tensor, wanted: Tensor, inner: Tensor, values: Tensor, error: Tensor) -> None:
    """Round `columns` (int64 [c]) of a grid, the last one first, each made up for by those before it.

    wanted  [c, n]   what each is to be rounded to, but for what these columns owe each other; of no use afterwards
    inner   [c, c]   the part of the factor L between these columns, lower triangular
    values  [K, n]   what they are rounded to is written into the rows `columns`
    error   [c, n]   what they then lack of `grid.target` is written here
    """
    args = (grid, columns, wanted, inner, values, error)
    select("gptq_columns", ANY_FORMAT, "", wanted.device.type, args).run(*args)


def descent_columns(grid: Grid, first: int, slope: Tensor, inner: Tensor, values: Tensor) -> None:
    """Move each of c columns of a grid, from column `first` on, to its best value with all others as they are.

    slope   [c, n]   the gradient H (target - values) of these columns, kept up to date
    inner   [c, c]   H between them
    values  [c, n]   what they are, and become
    """
    args = (grid, first, slope, inner, values)
    select("descent_columns", ANY_FORMAT, "", slope.device.type, args).run(*args)


def refit_unit(grid: Grid, start: int, stop: int, slope: Tensor, inner: Tensor, first: int, values: Tensor) -> None:
    """Give one unit, columns `start` to `stop`, its best step (and zero), with its codes as they are.

    Least squares in one or two unknowns, then the nearest that the format can store, where that is better.

    slope   [c, n]   the gradient of the columns from `first` on, of which the unit is a part; kept up to date
    inner   [c, c]   H between these columns
    values  [K, n]   all values, of which the unit's change with its step
    """
    args = (grid, start, stop, slope, inner, first, values)
    select("refit_unit", ANY_FORMAT, "", slope.device.type, args).run(*args)
