"""gptq_sweep for few rows and grids of integers and of floating-point values; as near to eager's as gptq_columns."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


def refuses(grid: Grid, order: Tensor, lower: Tensor, values: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if not order.is_contiguous():
        return "the order of the columns has gaps"
    return grid_columns.refuses_rows(values) or grid_columns.refuses(grid, (values,), lower)


@kernel("gptq_sweep", backend="cpu", refuses=refuses, tolerance=1e-3)
def gptq_sweep(grid: Grid, order: Tensor, lower: Tensor, values: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    native.module().gptq_sweep(
        *grid_columns.describe(grid), order.data_ptr(), lower.data_ptr(), *lower.stride(), *values.shape,
        grid.target.data_ptr(), values.data_ptr(), native.threads(),
    )  # fmt: skip
