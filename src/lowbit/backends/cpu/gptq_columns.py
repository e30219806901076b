"""gptq_columns for grids of integers and of floating-point values.

The same operations in the same order as eager's, whose sums are rounded once or twice a product, as its vectors fall: a
value may be the next one where two are equally near but for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


def refuses(grid: Grid, columns: Tensor, wanted: Tensor, inner: Tensor, values: Tensor, error: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if columns.dtype != torch.int64 or not columns.is_contiguous():
        return "the numbers of the columns are not int64 without gaps"
    return grid_columns.refuses(grid, (wanted, values, error), inner)


@kernel("gptq_columns", backend="cpu", refuses=refuses, tolerance=1e-3)
def gptq_columns(grid: Grid, columns: Tensor, wanted: Tensor, inner: Tensor, values: Tensor, error: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    count, n = wanted.shape
    native.module().gptq_columns(
        *grid_columns.describe(grid),
        columns.data_ptr(),
        count,
        n,
        wanted.data_ptr(),
        grid.target.data_ptr(),
        inner.data_ptr(),
        *inner.stride(),
        values.data_ptr(),
        error.data_ptr(),
        native.threads(),
    )
