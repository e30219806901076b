"""add_second_moment on every device: products of panels, only of those right of the diagonal."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import kernel

PANEL = 192  # columns of one product: narrower ones compute less below the diagonal, and each is slower


@kernel("add_second_moment", backend="eager")
def add_second_moment(total: Tensor, x: Tensor) -> None:
    """See `lowbit.ops.second_moment`."""
    x, k = x.float(), x.shape[1]
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        total[start:stop, start:].addmm_(x[:, start:stop].mT, x[:, start:])
