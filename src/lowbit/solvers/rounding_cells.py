"""Rounding to one of the two neighbours on a grid of levels, so that small changes of a weight survive on average.

A weight that lies on a grid and moves by a fraction p of the way to the next level is back where it was after rounding
to nearest. Both ways here move a share p of such weights by a whole level instead:

stochastic      each with probability p, on its own
error_feedback  what a weight could not take of its change is carried to the next one of its row, which moves when a
                whole level has come together: nothing is left to chance, and a row as a whole is off by less than one
                level. Rows start with different remainders (multiples of the golden ratio), so that the share is right
                at every place, however small p is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.integers import uniform_noise
from lowbit.numerics.levels import FloatLevels, IntegerLevels, Levels

ROUNDINGS = ("error_feedback", "stochastic", "nearest")
_GOLDEN = 0.6180339887498949


def has_cells(levels: Levels) -> bool:
    """Whether the neighbours on these levels are known."""
    return isinstance(levels, IntegerLevels | FloatLevels)


def cells(levels: Levels, x: Tensor) -> tuple[Tensor, Tensor]:
    """The level below or at each x (float32, finite) and the next one; beyond the last level both are the last."""
    if isinstance(levels, IntegerLevels):
        low = x.floor()
        return low.clamp(levels.low, levels.high), (low + 1).clamp_(levels.low, levels.high)
    assert isinstance(levels, FloatLevels)
    magnitude = x.abs().clamp_(max=levels.largest)
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**levels.min_exponent)
    step = power * 2.0**-levels.mantissa
    inner = (magnitude / step).floor_().mul_(step)
    outer = (inner + step).clamp_(max=levels.largest)
    negative = x < 0
    return torch.where(negative, -outer, inner), torch.where(negative, -inner, outer)


def extremes(levels: Levels) -> tuple[float, float]:
    """The lowest and the highest level."""
    ends = levels.round_(torch.tensor([-1e30, 1e30]))
    return float(ends[0]), float(ends[1])


@dataclass(frozen=True)
class Moved:
    """Levels [K, n], and the squared error in levels that each had to expect before chance or order had their say."""

    levels: Tensor
    expected: Tensor


def moved(levels: Levels, old: Tensor, change: Tensor, rounding: str, noise: Tensor | None) -> Moved:
    """The levels [K, n] near `old + change`, both in units of the step; `old` holds levels.

    noise: for "stochastic" uniform [K, n] in [0, 1), for "error_feedback" the remainders [n] that rows start with.
    """
    wanted = old + change
    if rounding == "nearest":
        chosen = levels.round_(wanted.clone())
        return Moved(chosen, (chosen - wanted).square_())
    low, high = cells(levels, wanted)
    beyond = wanted - torch.maximum(torch.minimum(wanted, high), low)
    up = change >= 0
    near, far = torch.where(up, low, high), torch.where(up, high, low)
    width = far - near
    share = torch.where(width == 0, 0.0, (wanted - near) / width).clamp_(0.0, 1.0)
    expected = (share * (1 - share)).mul_(width).mul_(width).add_(beyond.square_())
    assert noise is not None
    if rounding == "stochastic":
        return Moved(torch.where(noise < share, far, near), expected)
    passed = share.cumsum_(0).add_(noise).floor_()
    before = torch.cat([torch.zeros_like(passed[:1]), passed[:-1]])
    return Moved(torch.where(passed > before, far, near), expected)


def rounding_noise(rounding: str, k: int, start: int, stop: int, seed: int, device: torch.device) -> Tensor | None:
    """What `moved` needs of chance, or of the order of rows, for rows [start, stop)."""
    if rounding == "stochastic":
        return uniform_noise((stop - start, k), seed, start, device).t().contiguous()
    return remainders(start, stop, seed, device) if rounding == "error_feedback" else None


def remainders(start: int, stop: int, seed: int, device: torch.device) -> Tensor:
    """What rows [start, stop) begin with, in [0, 1): float32 [stop - start], evenly spread over any run of rows."""
    rows = torch.arange(start, stop, dtype=torch.float64, device=device) + 0.5 + seed
    return (rows * _GOLDEN).remainder_(1.0).float().clamp_(max=1 - 2.0**-24)


def dither(rounding: str, k: int, start: int, stop: int, seed: int, device: torch.device) -> Tensor | None:
    """Noise [n, K] for `Format.encode` where a format's neighbours are not known; None rounds to nearest.

    For "error_feedback" a fixed pattern that fills [0, 1) evenly along rows and along columns.
    """
    if rounding == "nearest":
        return None
    if rounding == "stochastic":
        return uniform_noise((stop - start, k), seed, start, device)
    columns = torch.arange(k, dtype=torch.float64, device=device) * 0.7548776662466927
    rows = (torch.arange(start, stop, dtype=torch.float64, device=device) + seed) * 0.5698402909980532
    return (rows.unsqueeze(1) + columns + 0.25).remainder_(1.0).float().clamp_(max=1 - 2.0**-24)
