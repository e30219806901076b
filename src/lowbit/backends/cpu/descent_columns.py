"""descent_columns for grids of integers and of floating-point values; as near to eager's as gptq_columns."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


def refuses(grid: Grid, first: int, slope: Tensor, inner: Tensor, values: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    return grid_columns.refuses(grid, (slope, values), inner)


@kernel("descent_columns", backend="cpu", refuses=refuses, tolerance=1e-3)
def descent_columns(grid: Grid, first: int, slope: Tensor, inner: Tensor, values: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    count, n = slope.shape
    native.module().descent_columns(
        *grid_columns.describe(grid),
        first,
        count,
        n,
        slope.data_ptr(),
        inner.data_ptr(),
        *inner.stride(),
        values.data_ptr(),
        native.threads(),
    )
