"""gptq_sweep for every grid: blocks of columns, between which errors are made up for by one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid
from lowbit.ops.columns import gptq_columns

BLOCK = 64  # columns: longer blocks make the updates within them dominate


@kernel("gptq_sweep", backend="eager")
def gptq_sweep(grid: Grid, order: Tensor, lower: Tensor, values: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    error = torch.empty_like(grid.target)
    room = grid.target.new_empty((min(BLOCK, order.shape[0]), grid.target.shape[1]))
    for last in range(order.shape[0], 0, -BLOCK):
        first = max(0, last - BLOCK)
        columns = order[first:last]
        wanted = torch.index_select(grid.target, 0, columns, out=room[: last - first])
        wanted.addmm_(lower[last:, first:last].t(), error[last:])
        gptq_columns(grid, columns, wanted, lower[first:last, first:last], values, error[first:last])
