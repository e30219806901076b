"""The steps and zeros that formats can store: what a `Grid` snaps to, told so that kernels can do it, too.

Each is a `Snap`: called with float32 steps (and zeros) it gives the nearest ones that can be stored, as float32. A
format whose rule is none of these gives the grid a function of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats.global_scale import GlobalScale
from lowbit.numerics.floats import E4M3_MAX, from_fp8, to_fp8

SMALLEST_E4M3 = 2.0**-9  # above zero
SMALLEST_POWER, LARGEST_POWER = 2.0**-126, 2.0**127


@dataclass(frozen=True)
class FloatSteps:
    """Steps of a floating-point dtype from `least` to `most`, and zeros of another one.

    with_sign: steps may be negative; what is smaller than `least` then becomes `least`, and there is no `most`.
    """

    least: float
    most: float = torch.inf
    dtype: torch.dtype = torch.float32
    zero_dtype: torch.dtype = torch.float32
    with_sign: bool = False

    def __call__(self, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Snap`."""
        if self.with_sign:
            step = torch.where(step.abs() < self.least, self.least, step)
        else:
            step = step.clamp(self.least, self.most)
        return step.to(self.dtype).float(), None if zero is None else zero.to(self.zero_dtype).float()


@dataclass(frozen=True)
class E4m3Steps:
    """Positive e4m3 values under a global scale, which is one or, the last axis of steps [G, n], one a row."""

    kind: GlobalScale
    global_scale: Tensor

    def __call__(self, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Snap`."""
        wanted = self.kind.over(step, self.global_scale).clamp_(SMALLEST_E4M3, E4M3_MAX)
        return self.kind.times(from_fp8(to_fp8(wanted, torch.float8_e4m3fn)), self.global_scale), zero

    def narrow(self, start: int, stop: int) -> E4m3Steps:
        """Those of some of the rows."""
        return replace(self, global_scale=self.global_scale[start:stop]) if self.global_scale.dim() else self


@dataclass(frozen=True)
class Multiples:
    """Whole multiples, from `low` to `high` but not 0, of a factor for each step; zeros likewise, negated, from 0 up.

    factor, zero_factor: float32 [U, n], the latter 0 where a zero can only be 0. Units that share a factor keep it.
    """

    factor: Tensor
    low: int
    high: int
    zero_factor: Tensor | None = None

    def __call__(self, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Snap`."""
        found = multiples_of(step, self.factor, self.low, self.high)
        least = torch.where((step < 0) == (self.factor < 0), 1.0, -1.0) if self.low else torch.ones_like(step)
        stored = torch.where(found == 0, least, found).mul_(self.factor)
        if zero is None or self.zero_factor is None:
            return stored, zero
        return stored, multiples_of(-zero, self.zero_factor, 0, self.high).mul_(self.zero_factor).neg_()

    def narrow(self, start: int, stop: int) -> Multiples:
        """Those of some of the rows."""
        return self._cut((slice(None), slice(start, stop)))

    def at(self, units: slice) -> Multiples:
        """Those of some of the units."""
        return self._cut((units, slice(None)))

    def _cut(self, where: tuple[slice, slice]) -> Multiples:
        zero_factor = None if self.zero_factor is None else self.zero_factor[where]
        return replace(self, factor=self.factor[where], zero_factor=zero_factor)


def multiples_of(x: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    """Which multiple of a factor is nearest to x, float32; 0 of a factor of 0."""
    return (x / factor.masked_fill(factor == 0, torch.inf)).round_().clamp_(low, high)


@dataclass(frozen=True)
class PowerSteps:
    """Powers of two, the nearest by difference; the smaller of two."""

    def __call__(self, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Snap`."""
        step = step.clamp(SMALLEST_POWER, LARGEST_POWER)
        below = (step.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power that is not above
        return torch.where(step > 1.5 * below, 2 * below, below).clamp_(max=LARGEST_POWER), zero
