"""descent_sweep for every grid: blocks of columns, between which the gradient is brought up to date by one product."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid
from lowbit.ops.columns import WIDEST, descent_columns, refit_unit

BLOCK = 64


def columns_at_once(grid: Grid) -> int:
    """The columns of a block: whole units, where they are not too wide."""
    return max(BLOCK // grid.columns, 1) * grid.columns if grid.columns <= WIDEST else BLOCK


@kernel("descent_sweep", backend="eager")
def descent_sweep(
    grid: Grid, values: Tensor, gradient: Tensor, hessian: Tensor, codes: bool, scales: bool, last: bool
) -> None:
    """See `lowbit.ops.columns`."""
    k, block = values.shape[0], columns_at_once(grid)
    room = gradient.new_empty((2, min(block, k), values.shape[1]))  # once: fresh pages cost more than what they hold
    for first in range(0, k, block):
        stop = min(first + block, k)
        slope, before = (x[: stop - first] for x in room)
        slope.copy_(gradient[first:stop])
        before.copy_(values[first:stop])
        inner = hessian[first:stop, first:stop]
        if codes:
            descent_columns(grid, first, slope, inner, values[first:stop])
        for start in range(first, stop, grid.columns) if scales else ():
            refit_unit(grid, start, min(start + grid.columns, stop), slope, inner, first, values)
        moved = torch.sub(values[first:stop], before, out=before)
        waiting = slice(stop if last else 0, k)
        gradient[waiting].addmm_(hessian[waiting, first:stop], moved, alpha=-1)
