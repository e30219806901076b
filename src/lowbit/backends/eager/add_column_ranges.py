"""add_column_ranges on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.ops.column_ranges import BINS


@kernel("add_column_ranges", backend="eager")
def add_column_ranges(
    x: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor, magnitudes: Tensor, step: int
) -> None:
    """See `lowbit.ops.column_ranges`."""
    x = x.float()
    total += x.sum(0)  # float32 for these rows (summed in a tree), float64 from there on
    torch.minimum(minimum, x.amin(0), out=minimum)  # aminmax takes eight times as long along rows
    torch.maximum(maximum, x.amax(0), out=maximum)
    bins = x[::step].abs().view(torch.int32) >> 19
    magnitudes += torch.bincount(bins.flatten(), minlength=BINS)
