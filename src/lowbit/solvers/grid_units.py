"""What happens in the units of a grid: which of them clip, the steps that would not, and their errors.

A unit's result is given to each of its rows, [U, n], so that it can be mixed with steps and zeros as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.grid import Grid
from lowbit.numerics.floats import divisor

from .rounding_cells import extremes

_UP = (1.07, 1.5)  # from a step to the next one that can be stored: of e4m3, of powers of two
_NO_STEP = 1e-12  # of the largest weight of a unit
_BEYOND = 1e-3  # levels beyond the last one that count as clipped: less is rounding of float32


def stored_steps(grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Steps, and zeros, that can be stored and at which the target fits, about the smallest: [U, n]."""
    exact, zero = fitting_steps(grid)
    step, zero = grid.snapped(slice(None), exact, zero)
    for factor in _UP if zero is None else ():
        larger, _ = grid.snapped(slice(None), exact * factor, None)
        step = torch.where(step.abs() < exact.abs() * (1 - _BEYOND), larger, step)
    return step, zero


def fitting_steps(grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The smallest steps, and zeros, at which the target fits between the lowest and the highest level: [U, n]."""
    lowest, highest = extremes(grid.levels)
    high, low = _largest(grid.target, grid), -_largest(-grid.target, grid)
    if grid.zero is not None:
        step = (high - low) / divisor(highest - lowest, high)
        return step, low - lowest * step
    sign = torch.where(grid.step < 0, -1.0, 1.0)
    above, below = torch.where(sign > 0, high, -low), torch.where(sign > 0, low, -high)
    least = below.clamp_max(0) / divisor(lowest, below) if lowest else above * 0
    need = torch.maximum(above.clamp_min(0) / divisor(highest, above), least)
    return torch.maximum(need, grid.step.abs()) * sign, None


def clipped_units(grid: Grid, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Units [U, n] with a wanted level [K, n] beyond the last one, or with anything but zeros at a step of 0.

    And what that costs: the squared error of clipping alone, as `unit_errors`.
    """
    lowest, highest = extremes(grid.levels)
    over = (wanted - wanted.clamp(lowest, highest)).square_()
    clips = _largest(over, grid) > _BEYOND**2
    if bool((grid.step == 0).any()):
        clips |= (grid.step == 0) & (_largest(grid.target.abs(), grid) > 0)
    return clips, unit_errors(grid, over)


def _largest(x: Tensor, grid: Grid) -> Tensor:
    """The largest x [K, n] of every unit, given to each of its rows: [U, n]."""
    units = _by_unit(x, grid, -torch.inf).amax(1)
    if grid.rows == 1:
        return units
    tall = _by_rows(units, grid.rows, -torch.inf).amax(2)
    return tall.repeat_interleave(grid.rows, dim=1)[:, : x.shape[1]]


def unit_errors(grid: Grid, squares: Tensor) -> Tensor:
    """Squared errors [K, n] in levels, summed over units in the weight's measure, given to each row: [U, n]."""
    return _summed(squares * grid.spread(grid.step, 0, squares.shape[0]).square(), grid)


def unused_errors(grid: Grid) -> tuple[Tensor, Tensor]:
    """Units with no step to speak of, which are nothing but their zeros, and their squared errors as they are: [U, n].

    Beside their target, steps are 0 or so small (MXFP4 has no 0) that errors in levels exceed float32.
    """
    off = grid.target if grid.zero is None else grid.target - grid.spread(grid.zero, 0, grid.target.shape[0])
    return grid.step.abs() <= _NO_STEP * _largest(off.abs(), grid), _summed(off.square(), grid)


def _summed(squares: Tensor, grid: Grid) -> Tensor:
    """Squared errors [K, n] summed over units in the weight's measure, given to each row: [U, n]."""
    if grid.factor is not None:
        squares = squares * grid.factor.square().unsqueeze(1)
    units = _by_unit(squares, grid, 0.0).sum(1)
    if grid.rows == 1:
        return units
    tall = _by_rows(units, grid.rows, 0.0).sum(2)
    return tall.repeat_interleave(grid.rows, dim=1)[:, : squares.shape[1]]


def _by_unit(x: Tensor, grid: Grid, fill: float) -> Tensor:
    """[K, n] -> [U, columns, n]."""
    missing = -x.shape[0] % grid.columns
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill).unflatten(0, (-1, grid.columns))


def _by_rows(x: Tensor, rows: int, fill: float) -> Tensor:
    """[U, n] -> [U, blocks of rows, rows]."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % rows), value=fill).unflatten(1, (-1, rows))


def count_units(units: Tensor, grid: Grid) -> int:
    """How many units are marked in [U, n], where each row of a unit has its mark."""
    return int(units[:, :: grid.rows].sum())
