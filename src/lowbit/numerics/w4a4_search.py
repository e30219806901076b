"""What a search for the parameters of a W4A4 weight does again and again, in PyTorch.

All of it is float32 and rounds by groups of 64 along K. `ops.w4a4_search` does the same by the kernels of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.numerics.groups import row_chunks
from lowbit.numerics.int4_matmul import GROUP, round_groups, rounded_input
from lowbit.numerics.low_rank import Passes, PiecePasses

_PIECE = 1 << 20  # elements of a piece of rows
_TO_LOWEST = 0.97 / -8  # the step that puts the largest weight of a group slightly beyond code -8: the best single one
_TINY = 1e-30  # of a float32 step: none is zero


class Steps(NamedTuple):
    """The steps that searches are given, by the kernels of one device."""

    passes: Callable[[Tensor, Tensor, Tensor, Tensor | None], Passes]
    """See `rounding_passes`."""

    input_noise: Callable[[Tensor, Tensor, bool], Tensor]
    """See `input_noise`."""


def rounding_passes(w: Tensor, factor: Tensor, weights: Tensor, noise: Tensor | None = None) -> Passes:
    """The way to go through w * factor, rounded to nearest with steps of absmax / 7.

    w: [N, K] of any float dtype; factor, weights, noise: [K], see `Passes.refinement`.
    """

    def pieces() -> Iterator[Tensor]:
        ranges = row_chunks(w.shape[0], w.shape[1], elements=_PIECE)
        return (w[a:b].contiguous().float() * factor for a, b in ranges)

    return PiecePasses(pieces, round_groups, weights, noise)


def input_noise(x: Tensor, smooth: Tensor, unsigned: bool) -> Tensor:
    """The mean square of what the runtime's quantizer takes from x [T, K] / smooth [K] in each channel, [K]."""
    return rounded_input(x, smooth, unsigned).sub_(x / smooth).square_().mean(0)


def lost_to_lowest(m: Tensor, rest: Tensor, out: Tensor) -> None:
    """out = m - rounded(rest), all [n, K]; `rest` may be written over.

    Rounded with the step whose code -8 is about the group's largest weight: the best that one step can do for a group.
    """
    groups = rest.unflatten(1, (rest.shape[1] // GROUP, GROUP))
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    step = torch.where(high > -low, high, low).mul_(_TO_LOWEST)
    step = torch.where(step.abs() < _TINY, _TINY, step)
    torch.sub(m, groups.mul_(step.reciprocal()).round_().clamp_(-8, 7).mul_(step).flatten(1), out=out)


PLAIN = Steps(rounding_passes, input_noise)
