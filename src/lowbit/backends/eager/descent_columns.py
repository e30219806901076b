"""descent_columns for every grid, a column at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


@kernel("descent_columns", backend="eager")
def descent_columns(grid: Grid, first: int, slope: Tensor, inner: Tensor, values: Tensor) -> None:
    """See `lowbit.ops.columns`. The best value is the nearest to q_k + (E H)_k / H_kk."""
    inverse: list[float] = inner.diagonal().reciprocal().tolist()
    rows = zip(values.unbind(0), slope.unbind(0), inner.unbind(0), inverse, strict=True)
    for column, (old, lean, felt, scale) in enumerate(rows, first):
        new = grid.nearest(torch.add(old, lean, alpha=scale), column)
        slope.addr_(felt, new - old, alpha=-1)
        old.copy_(new)
