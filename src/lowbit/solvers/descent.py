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
    for _ in range(ROUNDS - 1):
        sweep(draft, codes=codes, scales=scales)
        now = draft.error()
        if now > before * (1 - GAIN):
            return
        before = now
    sweep(draft, codes=codes, scales=scales, last=True)


def sweep(draft: Draft, *, codes: bool, scales: bool, last: bool = False) -> None:
    """One pass over all columns: their codes, the scales of their units (where the draft has them), or both.

    last: the gradient is of no use afterwards; of columns done it is then not kept up to date.
    """
    scales = scales and not draft.fixed_scales
    grid, values, gradient, hessian = draft.grid, draft.values, draft.gradient, draft.curvature.hessian
    k = values.shape[0]
    narrow = grid.columns <= WIDEST
    block = max(BLOCK // grid.columns, 1) * grid.columns if narrow else BLOCK
    room = gradient.new_empty((2, min(block, k), values.shape[1]))  # once: fresh pages cost more than what they hold
    whole = not last or (scales and not narrow)
    for first in range(0, k, block) if codes or narrow else ():
        stop = min(first + block, k)
        slope, before = (x[: stop - first] for x in room)
        slope.copy_(gradient[first:stop])
        before.copy_(values[first:stop])
        inner = hessian[first:stop, first:stop]
        if codes:
            descent_columns(grid, first, slope, inner, values[first:stop])
        if scales and narrow:
            for start in range(first, stop, grid.columns):
                refit_unit(grid, start, min(start + grid.columns, stop), slope, inner, first, values)
        moved = torch.sub(values[first:stop], before, out=before)
        waiting = slice(0 if whole else stop, k)
        gradient[waiting].addmm_(hessian[waiting, first:stop], moved, alpha=-1)
    if scales and not narrow:
        for start in range(0, k, grid.columns):
            refit_unit(grid, start, min(start + grid.columns, k), gradient, hessian, 0, values)
    if last:
        draft.forget_gradient()
