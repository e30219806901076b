"""The values that a code can stand for, before any scale: rounding to the nearest of them, in float32 and in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_EXPONENT = 0x7F800000  # of a float32: with the other bits cleared, 2 ** floor(log2 |x|)
MAGIC = 1.5 * 2.0**23  # added and taken off again, it leaves the multiples of what its own last bit is worth


class Levels(Protocol):
    """A fixed set of values, the same for all weights of a format."""

    def round_(self, x: Tensor) -> Tensor:
        """The nearest level of each value of x (float32, finite), ties to even; writes over x."""
        ...


@dataclass(frozen=True)
class IntegerLevels:
    """All integers from `low` to `high`."""

    low: int
    high: int

    def round_(self, x: Tensor) -> Tensor:
        """See `Levels`."""
        return x.round_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class FloatLevels:
    """Floating-point values with some bits of mantissa, subnormal below 2**min_exponent, up to `largest`."""

    mantissa: int
    min_exponent: int
    largest: float

    def round_(self, x: Tensor) -> Tensor:
        """See `Levels`. The sign of zeros is lost."""
        x.clamp_(-self.largest, self.largest)
        size = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=2.0**self.min_exponent)
        magic = size.mul_(MAGIC * 2.0**-self.mantissa)
        return x.add_(magic).sub_(magic)


E4M3 = FloatLevels(3, -6, 448.0)
E5M2 = FloatLevels(2, -14, 57344.0)
E2M1 = FloatLevels(1, 0, 6.0)
