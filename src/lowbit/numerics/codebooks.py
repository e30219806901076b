"""Codebooks: sorted tables of levels that codes stand for, and how they are fitted to samples.

Where a level is rounded to an integer after its scale (w4a8), the nearest of the rounded levels is one of the two whose
unrounded ones enclose the value: rounding moves a level by 1/2 at most, so a level beyond them cannot come closer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The table of comfy-kitchen's w4a8 weights: Lloyd-Max levels of Gaussian weights over the largest of their group. Its
# fastest kernels have these numbers built in, so they are part of the format.
GAUSSIAN_16 = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
_ITERATIONS = 40


def gaussian_codebook(device: torch.device) -> Tensor:
    """`GAUSSIAN_16` as float32 [16]."""
    return torch.tensor(GAUSSIAN_16, dtype=torch.float32, device=device)


def fitted_codebook(samples: Tensor, start: Tensor) -> Tensor:
    """The levels [L], sorted, with the least squared error on `samples` (1-D float32) that Lloyd's steps reach.

    start: the levels to begin with, sorted. A level that no sample is nearest to stays where it is.
    """
    ordered = samples.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    levels = start.double()
    ends = torch.tensor([0, ordered.numel()], device=ordered.device)
    for _ in range(_ITERATIONS):
        cuts = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([ends[:1], cuts, ends[1:]])
        count = edges.diff()
        levels = torch.where(count > 0, sums[edges].diff() / count.clamp_min(1), levels)
    return levels.sort().values.float()


def codebook_error(samples: Tensor, levels: Tensor) -> float:
    """The mean squared distance of `samples` (1-D float32) to the nearest of the sorted levels [L]."""
    nearest = torch.bucketize(samples, (levels[1:] + levels[:-1]) / 2)
    return float((samples - levels[nearest]).square().mean(dtype=torch.float64))


@dataclass(frozen=True)
class IntegerCodebook:
    """Codes that stand for integers: `level[code] * scale`, rounded half to even and clamped to [-limit, limit].

    levels: sorted, float32 [L], by code; None for those of `code - zero`, of which rounding uses `low` to `high`.
    """

    levels: Tensor | None
    limit: int
    low: int = 0
    high: int = 0
    zero: int = 0

    @property
    def ends(self) -> tuple[Tensor, Tensor] | tuple[int, int]:
        """The lowest and the highest level that rounding uses."""
        return (self.low, self.high) if self.levels is None else (self.levels[0], self.levels[-1])

    def integers(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What codes [..., g] stand for under scales [...]: float32."""
        levels = codes.float().sub_(self.zero) if self.levels is None else _pick(self.levels, codes.int())
        return self._integers(levels, scale.unsqueeze(-1))

    def round(self, target: Tensor, scale: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes and the integers they stand for, of a target [..., g] under scales that broadcast to it.

        The nearest integer, the lower code of equals; with uniform `noise` in [0, 1) one of the two that enclose the
        target, at random. A scale of 0 gives zeros.
        """
        target = target.clamp(-self.limit - 1, self.limit + 1)  # beyond, the differences would be lost in rounding
        code, lower, upper = self._around(target, scale)
        if noise is None:
            up = (upper - target).abs_() < (target - lower).abs_()
        else:
            up = target - lower > noise * (upper - lower)
        return code + up, torch.where(up, upper, lower)

    def squared_error(self, target: Tensor, scale: Tensor) -> Tensor:
        """The sum over the last axis of (target - nearest integer)^2; shapes as in `round`."""
        _, lower, upper = self._around(target, scale)
        nearest = torch.minimum(lower.sub_(target).abs_(), upper.sub_(target).abs_())
        return nearest.square_().sum(dim=-1)

    def _around(self, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lower of the two codes around each target, and both integers."""
        relative = target / scale.masked_fill(scale == 0, torch.inf)
        if self.levels is None:
            lower = relative.floor_().clamp_(self.low, self.high - 1)
            upper, code = lower + 1, lower + self.zero
        else:
            code = _enclosing(relative, self.levels)
            lower, upper = _pick(self.levels, code), _pick(self.levels[1:], code)
        return code, self._integers(lower, scale), self._integers(upper, scale)

    def _integers(self, levels: Tensor, scale: Tensor) -> Tensor:
        return (levels * scale).round_().clamp_(-self.limit, self.limit)


def _enclosing(x: Tensor, levels: Tensor) -> Tensor:
    """The number of the lower of the two levels [L] around each x, within 0 .. L - 2: int32; L is a power of two.

    Binary search by arithmetic: four times as fast as `torch.bucketize` on a CPU.
    """
    half = levels.numel() // 2
    number = (x >= levels[half]).to(torch.int32).mul_(half)
    while half > 1:
        half //= 2
        number += (x >= _pick(levels[half:], number)).to(torch.int32).mul_(half)
    return number.clamp_(max=levels.numel() - 2)


def _pick(levels: Tensor, number: Tensor) -> Tensor:
    """`levels[number]`, in a third of the time."""
    return levels.index_select(0, number.reshape(-1)).view(number.shape)
