"""The steps and zeros of the units of GGUF blocks, each on its own: searched for the least weighted squared error.

With the codes given, the best step (and zero) is least squares in one (or two) unknowns; with these given, the best
codes are the nearest. So a unit is rounded to several steps in turn, what is best for those codes is solved for, and
from the best of all it goes on from one to the other. Everything is a sum over the columns of a unit, for all units at
once: tensors are [c, M] for M units of c columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor
from lowbit.numerics.levels import IntegerLevels, Levels

_BELOW = (0.0, 0.5, 1.0)  # of what lies beyond the levels


class Sums(NamedTuple):
    """Weighted sums over the columns of each unit [M], of codes q and values x: of 1, q, q^2, x and q x."""

    one: Tensor
    q: Tensor
    qq: Tensor
    x: Tensor
    qx: Tensor


@dataclass(frozen=True)
class Units:
    """Values [c, M], how much the error of each counts (the same, or None where all count 1), and the levels."""

    x: Tensor
    weights: Tensor | None
    levels: Levels

    def rounded(self, step: Tensor, zero: Tensor | None) -> Tensor:
        """The levels [c, M] nearest to the values under steps and zeros [M]; 0 where a step is 0."""
        return self.levels.round_((self.x if zero is None else self.x - zero) * inverse(step))

    def weighted(self, x: Tensor) -> Tensor:
        """Each value [c, M] times its weight."""
        return x if self.weights is None else x * self.weights

    @property
    def mass(self) -> Tensor:
        """The sum of the weights of each unit [M]."""
        if self.weights is None:
            return self.x.new_full(self.x.shape[1:], self.x.shape[0])
        return self.weights.sum(0)

    def sums(self, q: Tensor) -> Sums:
        """The sums of codes [c, M] with the values."""
        heavy = self.weighted(q)
        return Sums(self.mass, heavy.sum(0), (heavy * q).sum(0), self.weighted(self.x).sum(0), (heavy * self.x).sum(0))

    def errors(self, step: Tensor, zero: Tensor | None) -> Tensor:
        """The weighted squared error of each unit [M] under steps and zeros [M], codes being the nearest."""
        values = self.rounded(step, zero).mul_(step)
        error = (values if zero is None else values.add_(zero)).sub_(self.x)
        return self.weighted(error.square_()).sum(0)


def search_steps(units: Units, tries: Sequence[float], passes: int, *, both_signs: bool) -> Tensor:
    """The best step of each unit [M], of levels around 0.

    tries: at what level to put the largest value, as what is added to the lowest level. passes: rounding and fitting in
    turn afterwards. both_signs: put it at the other end, too.
    """
    assert isinstance(units.levels, IntegerLevels)
    lowest, magnitude = units.levels.low, units.x.abs()
    extreme = units.x.gather(0, magnitude.argmax(0, keepdim=True)).squeeze(0)
    heavy = units.weighted(units.x)
    best, gained = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)

    def take(step: Tensor) -> None:
        nonlocal best, gained
        q = units.rounded(step, None)
        curve, lean = (units.weighted(q) * q).sum(0), (heavy * q).sum(0)
        fitted = lean * inverse(curve)
        gain = fitted * lean
        better = gain > gained
        best, gained = torch.where(better, fitted, best), torch.where(better, gain, gained)

    for sign in (1.0, -1.0) if both_signs else (1.0,):
        for more in tries:
            take(extreme / divisor(sign * (lowest + more), extreme))
    for _ in range(passes):
        take(best)
    return best


def search_steps_and_zeros(
    units: Units, tries: Sequence[float], passes: int, *, any_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """The best step, not below 0, and zero, not above it unless `any_zero`, of each unit [M], of levels from 0 up.

    tries: over how many levels to spread the range of a unit, as what is added to the highest one. What then lies
    beyond the levels is tried above them, below them, and half at either end.
    """
    assert isinstance(units.levels, IntegerLevels)
    least, most = units.x.amin(0), units.x.amax(0)
    least = least if any_zero else least.clamp_(max=0.0)
    above = Units(units.x - least, units.weights, units.levels)  # what is small beside its zero keeps its bits
    mass, whole = above.mass, above.weighted(above.x).sum(0)
    highest = units.levels.high
    best, zero, gained = torch.zeros_like(least), torch.zeros_like(least), torch.full_like(least, -1.0)

    def take(step: Tensor, start: Tensor) -> None:
        nonlocal best, zero, gained
        q = above.rounded(step, start)
        heavy = above.weighted(q)
        ones, curve, lean = heavy.sum(0), (heavy * q).sum(0), (heavy * above.x).sum(0)
        new = (mass * lean - whole * ones) * inverse(mass * curve - ones * ones)
        shift = (whole - new * ones) / mass
        if not any_zero:
            outside = shift > -least
            shift = torch.where(outside, -least, shift)
            new = torch.where(outside, (lean - shift * ones) * inverse(curve), new)
        new = new.clamp_(min=0.0)
        gain = new * (2 * lean - new * curve - 2 * shift * ones) + shift * (2 * whole - shift * mass)
        better = gain > gained
        best, zero = torch.where(better, new, best), torch.where(better, shift, zero)
        gained = torch.where(better, gain, gained)

    for more in tries:
        step = (most - least) / divisor(highest + more, most)
        for below in _BELOW:
            take(step, step * (more * below))
    for _ in range(passes):
        take(best, zero)
    return best, zero + least


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0 or so small that there is none."""
    found = x.reciprocal()
    return found.masked_fill_(found.isinf(), 0.0)
