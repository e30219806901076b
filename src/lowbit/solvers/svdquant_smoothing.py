"""Smoothing factors of a W4A4 layer from what calibration saw of its input.

The factors s hand unevenness from x to W: y = (x / s) (W s)^T. Candidates are s = x^a / w^b, channel by channel, with x
and w the root mean squares of the input and of the weight's column. Each is judged by `numerics.smoothing`'s
`smoothed_error`: what rounding costs the weight, times the input's second moments, plus what the runtime's own
quantizer costs samples of the input, times the weight, both beside a low rank. On trained layers that estimate is
within 0.3 dB of the output error measured on the samples, so nothing is evaluated in full. Root mean squares do better
than the largest magnitudes, which are what deepcompressor takes; b matters little, because the low rank takes away
most of the columns' unevenness.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.numerics.smoothing import bottom, smoothed_error, smoothing_factors
from lowbit.ops.w4a4_search import STEPS

_EXPONENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_USUAL = 4  # the index of the exponent that trained layers are nearest to
_WEIGHT_EXPONENTS = (0.3,)
_STEP = 0.1
_RANGE = (2.0**-14, 2.0**15)  # of the factors: normal numbers in every stored dtype
_TOKENS = 128  # samples that candidates are judged on
_SIMULATED = 64
_SEED = 0x5D1


def calibrated_smoothing(
    rows: Tensor,
    moments: Tensor,
    samples: Tensor,
    rank: int,
    *,
    unsigned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The factors [K], as `dtype` holds them, with the smallest estimated output error.

    rows: a sample [n, K] of the weight, float32. moments: E[x_k^2] [K]. samples: rows of x [S, K].
    """
    x, size, columns = samples[:_TOKENS], moments.sqrt(), rows.square().mean(0).sqrt_()

    def factors(a: float, b: float) -> Tensor:
        return (smoothing_factors(size, -a) * smoothing_factors(columns, b)).clamp_(*_RANGE).to(dtype)

    @cache
    def error(a: float, b: float) -> float:
        return smoothed_error(rows, factors(a, b).float(), x, rank, unsigned, STEPS, moments)

    a = _EXPONENTS[bottom(lambda index: error(_EXPONENTS[index], 0.0), len(_EXPONENTS), _USUAL)]
    a = min((near for near in (a, a - _STEP, a + _STEP) if 0 <= near <= 1), key=lambda near: error(near, 0.0))
    return factors(a, min((0.0, *_WEIGHT_EXPONENTS), key=lambda b: error(a, b)))


def simulated_input(moments: Tensor, unsigned: bool) -> Tensor:
    """Samples [T, K] for an input of which only E[x_k^2] [K] is known: Gaussian, or its magnitude if unsigned."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (_SIMULATED, moments.shape[0])
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(moments.device)
    return (x.abs() if unsigned else x) * moments.sqrt()
