"""Smoothing factors without data: how much of the columns' unevenness the weight hands over to the activations.

y = (x / s) (W s)^T for any positive s [K]. A column of W with large values spoils the steps of all weights in its
group; a small s_k shrinks it, and makes x_k / s_k as much larger. The candidates are s = a^-e with a the columns'
largest magnitudes and exponents e from 0 (leave it to the weight) to 1 (leave it to the activations). Which is best
depends on the layer's input; when nothing is known of it, the one is taken that gives the smallest error for Gaussian
input of unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

from lowbit.numerics.low_rank import leading_basis_of
from lowbit.numerics.w4a4_search import Steps

EXPONENTS = tuple(i / 8 for i in range(9))
_USUAL = 1  # the index of the exponent that trained layers are nearest to
_PASSES = 2  # a rough low rank is enough to tell the candidates apart
_TOKENS = 64  # of simulated input
_SEED = 0x5D0
_SMALLEST = 2.0**-8  # of the mean column: an empty column needs no enormous factor


def column_amax(pieces: Iterable[Tensor], columns: int, device: torch.device) -> Tensor:
    """The largest magnitude in each column, float32 [K]. NaN propagates."""
    best = torch.zeros(columns, dtype=torch.float32, device=device)
    for rows in pieces:
        if rows.shape[0] and rows.dtype.itemsize == 2:  # as bits, five times as fast on a CPU as the floats
            bits = rows.view(torch.int16) & 0x7FFF
            best = torch.maximum(best, bits.amax(dim=0).view(rows.dtype).float())
        elif rows.shape[0]:
            low, high = torch.aminmax(rows, dim=0)
            best = torch.maximum(best, torch.maximum(high.float(), -low.float()))
    return best


def smoothing_factors(amax: Tensor, exponent: float) -> Tensor:
    """amax**-exponent, float32 [K], with a geometric mean of 1; all ones for a zero matrix."""
    mean = amax.mean()
    if not exponent or not bool(mean > 0):
        return torch.ones_like(amax)
    logs = (amax / mean).clamp_min_(_SMALLEST).log_()
    return logs.sub_(logs.mean()).mul_(-exponent).exp_()


def choose_smoothing(rows: Tensor, amax: Tensor, rank: int, unsigned: bool, dtype: torch.dtype, steps: Steps) -> Tensor:
    """The candidate [K], as `dtype` holds it, with the smallest `smoothed_error`.

    rows: a sample [n, K] of the weight, float32. amax: of all its columns [K]. With `unsigned` the simulated input has
    been through a GELU, and is shifted and quantized without a sign.
    """
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn((_TOKENS, rows.shape[1]), generator=generator, dtype=torch.float32, device="cpu").to(rows.device)
    x = gelu(x) if unsigned else x

    def candidate(index: int) -> Tensor:
        return smoothing_factors(amax, EXPONENTS[index]).to(dtype)

    def error(index: int) -> float:
        return smoothed_error(rows, candidate(index).float(), x, rank, unsigned, steps)

    return candidate(bottom(error, len(EXPONENTS), _USUAL))


def bottom(error: Callable[[int], float], count: int, start: int) -> int:
    """The index below `count` where a walk from `start` finds no neighbour with a smaller error; NaN is the largest.

    Errors along an exponent have one valley: of all layers of a sentence model the walk missed no best candidate, with
    a third to a half of the evaluations.
    """

    @cache
    def known(index: int) -> float:
        found = error(index)
        return math.inf if math.isnan(found) else found

    best = start
    while True:
        near = [index for index in (best - 1, best, best + 1) if 0 <= index < count]
        least = min(near, key=known)  # the first of equals, so that the walk ends
        if least == best:
            return best
        best = least


def smoothed_error(
    rows: Tensor, smooth: Tensor, x: Tensor, rank: int, unsigned: bool, steps: Steps, moments: Tensor | None = None
) -> float:
    """The squared output error per token x [T, K] of W (rows [n, K]) with these factors, in 4 bits beside a low rank.

    moments: E[x_k^2] [K] where more is known than those of `x`. All are float32.

    The low rank holds the leading part of M = W s, and the rest is rounded. Two independent errors add up, each summed
    over channels: that of the weight, times the input; and that of the input, times the rounded weight.
    """
    seen = x.square().mean(0) if moments is None else moments
    passes = steps.passes(rows, smooth, seen / smooth.square(), steps.input_noise(x, smooth, unsigned))
    basis = leading_basis_of(passes.step, rows.shape[1], rank, _PASSES, rows.device)
    return passes.refinement(basis, rank, step=False)[0]
