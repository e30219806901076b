"""coordinate_descent, scale_refit, descent: lower tr(E H E^T) step by step, never raising it.

coordinate_descent  goes through the columns and moves each code to the best one with all others as they are: the
                    nearest to q_k + (E H)_k / H_kk, exactly, whatever the grid (CDQuant, arXiv 2406.17542)
scale_refit         goes through the units and gives each the best scale (and zero) with its codes as they are: least
                    squares in one or two unknowns, then the nearest that the format can store, where that is better
descent             both in turn, until a round gains less than GAIN

All keep the gradient H E^T up to date, which costs as much as one matrix product a round. Units of many columns have
their scales refitted after a round, others within it.
"""

from __future__ import annotations

from lowbit.ops.columns import WIDEST, descent_sweep, refit_unit

from .refinement import Draft, register_refinement

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

    last: the gradient is of no use afterwards.
    """
    scales = scales and not draft.fixed_scales
    grid, values, gradient, hessian = draft.grid, draft.values, draft.gradient, draft.curvature.hessian
    narrow = scales and grid.columns <= WIDEST
    wide = scales and not narrow
    if codes or narrow:
        descent_sweep(grid, values, gradient, hessian, codes=codes, scales=narrow, last=last and not wide)
    for start in range(0, values.shape[0], grid.columns) if wide else ():
        refit_unit(grid, start, min(start + grid.columns, values.shape[0]), gradient, hessian, 0, values)
    if last:
        draft.forget_gradient()
