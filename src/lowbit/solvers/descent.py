"""coordinate_descent, scale_refit, descent: lower tr(E H E^T) step by step, never raising it.

coordinate_descent  goes through the columns and moves each code to the best one with all others as they are: the
                    nearest to q_k + (E H)_k / H_kk, exactly, whatever the grid (CDQuant, arXiv 2406.17542)
scale_refit         goes through the units and gives each the best scale (and zero) with its codes as they are: least
                    squares in one or two unknowns, then the nearest that the format can store, where that is better
descent             both in turn, until a round gains less than GAIN

All keep the gradient H E^T up to date a block of columns at a time, which costs one matrix product a round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.ops.columns import descent_columns

from .refinement import Draft, register_refinement

BLOCK = 64
WIDEST = 256  # a unit with more columns than this has its scale refitted after the round, not within it
ROUNDS = 2
GAIN = 5e-3  # of the error: a round that gains less is the last one


@register_refinement("coordinate_descent")
def coordinate_descent(draft: Draft) -> None:
    """Move single codes until that gains little. See the module."""
    _rounds(draft, codes=True, scales=False)


@register_refinement("scale_refit")
def scale_refit(draft: Draft) -> None:
    """Refit the scales, once. See the module."""
    sweep(draft, codes=False, scales=True)


@register_refinement("descent")
def descent(draft: Draft) -> None:
    """Codes and scales in turn. See the module."""
    _rounds(draft, codes=True, scales=True)


def _rounds(draft: Draft, *, codes: bool, scales: bool) -> None:
    before = draft.error()
    for _ in range(ROUNDS):
        sweep(draft, codes=codes, scales=scales)
        now = draft.error()
        if now > before * (1 - GAIN):
            return
        before = now


def sweep(draft: Draft, *, codes: bool, scales: bool) -> None:
    """One pass over all columns: their codes, the scales of their units, or both."""
    grid, values, gradient, hessian = draft.grid, draft.values, draft.gradient, draft.curvature.hessian
    k = values.shape[0]
    narrow = grid.columns <= WIDEST
    block = max(BLOCK // grid.columns, 1) * grid.columns if narrow else BLOCK
    for first in range(0, k, block) if codes or narrow else ():
        last = min(first + block, k)
        slope, before = gradient[first:last].clone(), values[first:last].clone()
        inner = hessian[first:last, first:last]
        if codes:
            descent_columns(grid, first, slope, inner, values[first:last])
        if scales and narrow:
            for start in range(first, last, grid.columns):
                _refit(draft, start, min(start + grid.columns, last), slope, inner, first)
        gradient.addmm_(hessian[:, first:last], values[first:last] - before, alpha=-1)
    if scales and not narrow:
        for start in range(0, k, grid.columns):
            _refit(draft, start, min(start + grid.columns, k), gradient, hessian, 0)


def _refit(draft: Draft, start: int, stop: int, slope: Tensor, inner: Tensor, first: int) -> None:
    """The best step (and zero) of one unit, columns `start` to `stop`, with its codes as they are.

    slope [columns, n] and inner: gradient and H of the columns from `first` on, of which the unit is a part.
    """
    grid = draft.grid
    mine, unit = slice(start - first, stop - first), grid.units(start, stop)
    levels = grid.levels_of(draft.values[start:stop], start, stop)
    felt = inner[:, mine] @ levels
    curve = (felt[mine] * levels).sum(0)
    lean = (slope[mine] * levels).sum(0)
    step = grid.step[unit]
    if grid.zero is None:
        new, zero = _best_step(draft, step, _over_rows(curve, grid.rows), _over_rows(lean, grid.rows)), None
    else:
        ones = inner[mine, mine].sum(1)
        terms = (curve, ones @ levels, ones.sum(), lean, slope[mine].sum(0))
        new, zero = _best_step_and_zero(draft, step, grid.zero[unit], terms)
        slope.addr_(inner[:, mine].sum(1), (zero - grid.zero[unit])[0], alpha=-1)
    slope.addcmul_(felt, new - step, value=-1)
    grid.replace_steps(unit, new, zero)
    draft.values[start:stop] = new * levels if zero is None else new * levels + zero


def _over_rows(x: Tensor, rows: int) -> Tensor:
    """Sums [n] over the rows that share a step, each row given its sum."""
    if rows == 1:
        return x
    sums = torch.nn.functional.pad(x, (0, -x.shape[0] % rows)).view(-1, rows).sum(1)
    return sums.repeat_interleave(rows)[: x.shape[0]]


def _best_step(draft: Draft, step: Tensor, curve: Tensor, lean: Tensor) -> Tensor:
    """The storable step [1, n] with the least d^2 curve - 2 d lean, d being the change; the old one if none is less."""
    move = torch.where(curve > 0, lean / curve, 0.0)
    new, _ = draft.grid.snap(step + move, None)
    change = new - step
    better = (change * (change * curve - 2 * lean) < 0) & (step != 0)
    return torch.where(better, new, step)


def _best_step_and_zero(draft: Draft, step: Tensor, zero: Tensor, terms: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """As `_best_step` in two unknowns; terms: the quadratic form's three entries, then the linear form's two."""
    ss, sz, zz, s, z = terms
    determinant = ss * zz - sz.square()
    solvable = determinant > 1e-6 * ss * zz
    move_step = torch.where(solvable, (s * zz - z * sz) / determinant, 0.0)
    move_zero = torch.where(solvable, (z * ss - s * sz) / determinant, z / zz)
    new, new_zero = draft.grid.snap(step + move_step, zero + move_zero)
    assert new_zero is not None
    a, b = new - step, new_zero - zero
    better = a * (a * ss + 2 * b * sz - 2 * s) + b * (b * zz - 2 * z) < 0
    return torch.where(better, new, step), torch.where(better, new_zero, zero)
