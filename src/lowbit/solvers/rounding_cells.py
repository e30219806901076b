"""Rounding to one of the two neighbours on a grid of levels, so that small changes of a weight survive on average.

A weight that lies on a grid and moves by a fraction p of the way to the next level is back where it was after rounding
to nearest. Both ways here move a share p of such weights by a whole level instead:

stochastic      each with probability p, on its own
error_feedback  what a weight could not take of its change is carried to the next one of its row, which moves when a
                whole level has come together: nothing is left to chance, and a row as a whole is off by less than one
                level. Rows start with different remainders (multiples of the golden ratio), so that the share is right
                at every place, however small p is.

Weights at the end of their grid cannot move outward. What they lose, the others of their row make up for.
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
class Choice:
    """Two neighbours for every weight, [K, n] each, before chance or order have their say.

    `near` is the level on the side that the weight comes from, `far` the other one, `share` how often it should be
    `far`, in [0, 1]. `expected`: the squared error to expect, in levels, clipping included.
    """

    near: Tensor
    far: Tensor
    share: Tensor
    expected: Tensor

    def settle(self, share: Tensor, noise: Tensor | None) -> Tensor:
        """The levels, with a share of one's own. noise: see `rounding_noise`; None for choices of one level."""
        if noise is None:
            return self.near.clone()
        if noise.dim() == 2:
            return torch.where(noise < share, self.far, self.near)
        passed = share.cumsum(0).add_(noise).floor_()
        before = torch.cat([torch.zeros_like(passed[:1]), passed[:-1]])
        return torch.where(passed > before, self.far, self.near)


def choice(levels: Levels, old: Tensor, change: Tensor, rounding: str) -> Choice:
    """The levels near `old + change`, [K, n] in units of the step; `old` holds levels."""
    wanted = old + change
    if rounding == "nearest":
        chosen = levels.round_(wanted.clone())
        return Choice(chosen, chosen, torch.zeros_like(chosen), (chosen - wanted).square_())
    low, high = cells(levels, wanted)
    beyond = wanted - torch.maximum(torch.minimum(wanted, high), low)
    up = change >= 0
    near, far = torch.where(up, low, high), torch.where(up, high, low)
    width = far - near
    share = torch.where(width == 0, 0.0, (wanted - near) / width).clamp_(0.0, 1.0)
    expected = (share * (1 - share)).mul_(width).mul_(width).add_(beyond.square_())
    return Choice(near, far, share, expected)


def rounding_noise(rounding: str, k: int, start: int, stop: int, seed: int, device: torch.device) -> Tensor | None:
    """What `Choice.settle` needs of chance, or of the order of rows, for rows [start, stop).

    "stochastic": uniform [K, n] in [0, 1); "error_feedback": the remainders [n] that rows start with.
    """
    if rounding == "stochastic":
        return uniform_noise((stop - start, k), seed, start, device).t().contiguous()
    return remainders(start, stop, seed, device) if rounding == "error_feedback" else None


def remainders(start: int, stop: int, seed: int, device: torch.device) -> Tensor:
    """What rows [start, stop) begin with, in [0, 1): float32 [stop - start], evenly spread over any run of rows."""
    rows = torch.arange(start, stop, dtype=torch.float64, device=device) + 0.5 + seed
    return (rows * _GOLDEN).remainder_(1.0).float().clamp_(max=1 - 2.0**-24)
