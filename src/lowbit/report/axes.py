"""Places on an axis, in percent of its length, so that a picture is as wide as its page and its text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_NINES = 7.0  # a cosine nearer to 1 than 1e-7 is told apart by nobody


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Iterable[float], *, zero: bool = False, steps: int = 5) -> Axis:
        """The axis with round ends that holds all finite values; with `zero`, it starts there."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = (0.0 if zero else min(finite)), max(finite)
        step = _round_step(max(high - low, abs(high) * 0.01, 1e-9) / steps)
        first, last = math.floor(low / step), math.ceil(high / step)
        last = max(last, first + 1)
        return cls(first * step, last * step, tuple(index * step for index in range(first, last + 1)))

    def percent(self, value: float) -> float:
        """Where a value lies, in percent; beyond the ends, at the end."""
        share = (value - self.low) / (self.high - self.low) if math.isfinite(value) else float(value > 0)
        return round(100 * min(1.0, max(0.0, share)), 3)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def nines(cosine: float) -> float:
    """How near a cosine is to 1: -log10(1 - cosine). 0.99 is 2, 0.999 is 3."""
    return min(MAX_NINES, -math.log10(max(1.0 - cosine, 10.0**-MAX_NINES)))


def nines_label(value: float) -> str:
    """The cosine that has so many nines: 0.999 for 3."""
    return f"{1 - 10.0**-value:.{max(1, math.ceil(value))}f}" if value else "0"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least `gap` apart, between `low` and `high` where they fit; the order stays."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = dict.fromkeys(order, 0.0)
    at = low - gap
    for index in order:
        at = places[index] = max(wanted[index], at + gap)
    at = high + gap
    for index in reversed(order):
        at = places[index] = min(places[index], at - gap)
    return [places[index] for index in range(len(wanted))]
