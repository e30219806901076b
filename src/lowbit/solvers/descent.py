"""coordinate_descent, scale_refit, descent: lower tr(E H E^T) step by step, never raising it.

coordinate_descent  goes through the columns and moves each code to the best one with all others as they are: the
                    nearest to q_k + (E H)_k / H_kk, exactly, whatever the grid (CDQuant, arXiv 2406.17542)
scale_refit         goes through the units and gives each the best scale (and zero) with its codes as they are: least
                    squares in one or two unknowns, then the nearest that the format can store, where that is better
descent             both in turn, until a round gains less than GAIN

All keep the gradient H E^T up to date a block of columns at a time, which costs one matrix product a round.
"""

from __future__ import annotations

from lowbit.ops.columns import descent_columns, refit_unit

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
                refit_unit(grid, start, min(start + grid.columns, last), slope, inner, first, values)
        gradient.addmm_(hessian[:, first:last], values[first:last] - before, alpha=-1)
    if scales and not narrow:
        for start in range(0, k, grid.columns):
            refit_unit(grid, start, min(start + grid.columns, k), gradient, hessian, 0, values)
