"""gptq_columns for every grid, a column at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid


@kernel("gptq_columns", backend="eager")
def gptq_columns(grid: Grid, columns: Tensor, wanted: Tensor, inner: Tensor, values: Tensor, error: Tensor) -> None:
    """See `lowbit.ops.columns`."""
    places: list[int] = columns.tolist()
    rows, missing = wanted.unbind(0), error.unbind(0)
    for i in range(len(places) - 1, -1, -1):
        value = grid.nearest(rows[i], places[i])
        values[places[i]].copy_(value)
        missed = torch.sub(grid.target[places[i]], value, out=missing[i])
        if i:
            wanted[:i].addr_(inner[i, :i], missed)
