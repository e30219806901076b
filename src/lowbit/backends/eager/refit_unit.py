"""refit_unit for every grid."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


@kernel("refit_unit", backend="eager")
def refit_unit(grid: Grid, start: int, stop: int, slope: Tensor, inner: Tensor, first: int, values: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    mine, unit = slice(start - first, stop - first), grid.units(start, stop)
    levels = grid.levels_of(values[start:stop], start, stop)
    felt = inner[:, mine] @ levels
    curve = (felt[mine] * levels).sum(0)
    lean = (slope[mine] * levels).sum(0)
    step = grid.step[unit]
    if grid.zero is None:
        new, zero = _best_step(grid, unit, _over_rows(curve, grid.rows), _over_rows(lean, grid.rows)), None
    else:
        ones = inner[mine, mine].sum(1)
        terms = (curve, ones @ levels, ones.sum(), lean, slope[mine].sum(0))
        new, zero = _best_step_and_zero(grid, unit, grid.zero[unit], terms)
        slope.addr_(inner[:, mine].sum(1), (zero - grid.zero[unit])[0], alpha=-1)
    slope.addcmul_(felt, new - step, value=-1)
    grid.replace_steps(unit, new, zero)
    values[start:stop] = new * levels if zero is None else new * levels + zero


def _over_rows(x: Tensor, rows: int) -> Tensor:
    """Sums [n] over the rows that share a step, each row given its sum."""
    if rows == 1:
        return x
    sums = torch.nn.functional.pad(x, (0, -x.shape[0] % rows)).view(-1, rows).sum(1)
    return sums.repeat_interleave(rows)[: x.shape[0]]


def _best_step(grid: Grid, unit: slice, curve: Tensor, lean: Tensor) -> Tensor:
    """The storable step [1, n] with the least d^2 curve - 2 d lean, d being the change; the old one if none is less."""
    step = grid.step[unit]
    move = torch.where(curve > 0, lean / curve, 0.0)
    new, _ = grid.snapped(unit, step + move, None)
    change = new - step
    better = (change * (change * curve - 2 * lean) < 0) & (step != 0)
    return torch.where(better, new, step)


def _best_step_and_zero(grid: Grid, unit: slice, zero: Tensor, terms: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """As `_best_step` in two unknowns; terms: the quadratic form's three entries, then the linear form's two."""
    step = grid.step[unit]
    ss, sz, zz, s, z = terms
    determinant = ss * zz - sz.square()
    solvable = determinant > 1e-6 * ss * zz
    move_step = torch.where(solvable, (s * zz - z * sz) / determinant, 0.0)
    move_zero = torch.where(solvable, (z * ss - s * sz) / determinant, z / zz)
    new, new_zero = grid.snapped(unit, step + move_step, zero + move_zero)
    assert new_zero is not None
    a, b = new - step, new_zero - zero
    better = a * (a * ss + 2 * b * sz - 2 * s) + b * (b * zz - 2 * z) < 0
    return torch.where(better, new, step), torch.where(better, new_zero, zero)
