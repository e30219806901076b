"""The global scale of nvfp4: one float32 for a weight or for each of its rows, by which scales count or are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.floats import E2M1_MAX, E4M3_MAX, divisor

LARGEST_GROUP = E2M1_MAX * E4M3_MAX
# Times the smallest scale, 2**-9, this is still a normal float32, whose division loses nothing.
MIN_GLOBAL_SCALE = 2.0**-117


@dataclass(frozen=True)
class GlobalScale:
    """A factor, or with `divides` a divisor; one of the whole weight [], or with `by_row` one a row [N]."""

    divides: bool
    by_row: bool

    def over(self, x: Tensor, value: Tensor) -> Tensor:
        """x in units of the global scale `value`."""
        return x * value if self.divides else x / value

    def times(self, x: Tensor, value: Tensor) -> Tensor:
        """What x stands for, which is in units of the global scale `value`. Writes over x."""
        return x.div_(value) if self.divides else x.mul_(value)

    def beside_groups(self, params: Mapping[str, Tensor]) -> Tensor:
        """The global scale of some rows so that it broadcasts over their scales [n, G]."""
        value = params["global_scale"]
        return value.unsqueeze(-1) if self.by_row else value

    def fitted(self, amax: Tensor) -> Tensor:
        """The one with which a group of this largest magnitude gets the largest scale; 1 for zeros."""
        if self.divides:
            return torch.where(amax > 0, (LARGEST_GROUP / amax).clamp_max(1 / MIN_GLOBAL_SCALE), 1.0)
        return torch.where(amax > 0, (amax / divisor(LARGEST_GROUP, amax)).clamp_min(MIN_GLOBAL_SCALE), 1.0)

    def recast(self, value: Tensor, other: GlobalScale, rows: int) -> Tensor:
        """The same as `other` counts it, of a weight of that many rows. A reciprocal is rounded; copies are not."""
        if other.divides != self.divides:
            value = value.reciprocal()
        return value.expand(rows).clone() if other.by_row and not self.by_row else value
