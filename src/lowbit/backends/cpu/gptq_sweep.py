"""gptq_sweep for grids of integers and of floating-point values; as near to eager's as gptq_columns.

Few rows go through all columns in one call, many by eager's blocks of columns, which are rounded natively.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.backends.eager import gptq_sweep as blocks
from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


def refuses(grid: Grid, order: Tensor, lower: Tensor, values: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if order.dtype != torch.int64 or not order.is_contiguous():
        return "the order of the columns is not int64 without gaps"
    return grid_columns.refuses(grid, (values,), lower)


@kernel("gptq_sweep", backend="cpu", refuses=refuses, tolerance=1e-3)
def gptq_sweep(grid: Grid, order: Tensor, lower: Tensor, values: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    if grid_columns.in_blocks(values):
        blocks.gptq_sweep(grid, order, lower, values)
        return
    native.module().gptq_sweep(
        *grid_columns.describe(grid), order.data_ptr(), lower.data_ptr(), *lower.stride(), *values.shape,
        grid.target.data_ptr(), values.data_ptr(), native.threads(),
    )  # fmt: skip
