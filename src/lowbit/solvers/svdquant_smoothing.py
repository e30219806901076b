"""Smoothing factors of a W4A4 layer from what calibration saw of its input.

The factors s hand unevenness from x to W: y = (x / s) (W s)^T. Candidates are s = x^a / w^b, channel by channel, with x
the root mean square or the largest magnitude of the input and w the root mean square of the weight's column. Each is
judged by `numerics.smoothing.smoothed_error`: what rounding costs the weight, times the input's second moments, plus
what the runtime's own quantizer costs samples of the input, times the weight, both beside a low rank. On trained layers
that estimate is within 0.2 dB of the output error measured on the samples, so nothing is evaluated in full. Root mean
squares are better than the largest magnitudes, which are what deepcompressor takes, by up to 1 dB; the exponent b
matters little, because the low rank takes away most of the columns' unevenness.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.numerics.int4_matmul import rounded_input
from lowbit.numerics.smoothing import smoothed_error, smoothing_factors

_EXPONENTS = (0.2, 0.4, 0.6, 0.8, 1.0)
_WEIGHT_EXPONENTS = (0.1, 0.3)
_STEP = 0.1
_RANGE = (2.0**-14, 2.0**15)  # of the factors: normal numbers in every stored dtype
_TOKENS = 128  # samples that candidates are judged on
_SIMULATED = 64
_SEED = 0x5D1


def calibrated_smoothing(
    rows: Tensor,
    moments: Tensor,
    samples: Tensor,
    absmax: Tensor | None,
    rank: int,
    *,
    unsigned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The factors [K], as `dtype` holds them, with the smallest estimated output error.

    rows: a sample [n, K] of the weight, float32. moments: E[x_k^2] [K]. samples: rows of x [S, K]. absmax: of x [K].
    """
    x = samples[:_TOKENS]
    sizes = [moments.sqrt()] + ([] if absmax is None else [absmax])
    columns = rows.square().mean(0).sqrt_()

    def factors(size: Tensor, a: float, b: float) -> Tensor:
        return (smoothing_factors(size, -a) * smoothing_factors(columns, b)).clamp_(*_RANGE).to(dtype)

    tried: dict[tuple[int, float, float], float] = {}

    def attempt(key: tuple[int, float, float]) -> float:
        if key not in tried:
            smooth = factors(sizes[key[0]], *key[1:]).float()
            tried[key] = smoothed_error(rows, smooth, x, rank, unsigned, moments)
        return tried[key]

    for key in [(0, 0.0, 0.0), *((i, a, 0.0) for i in range(len(sizes)) for a in _EXPONENTS)]:
        attempt(key)
    for _ in range(2):
        for key in _near(min(tried, key=tried.__getitem__)):
            attempt(key)
    which, a, b = min(tried, key=tried.__getitem__)
    return factors(sizes[which], a, b)


def _near(key: tuple[int, float, float]) -> Iterator[tuple[int, float, float]]:
    which, a, b = key
    for other in (a - _STEP, a + _STEP):
        if 0 <= other <= 1:
            yield which, round(other, 2), b
    for share in _WEIGHT_EXPONENTS:
        yield which, a, share


def simulated_input(moments: Tensor, unsigned: bool) -> Tensor:
    """Samples [T, K] for an input of which only E[x_k^2] [K] is known: Gaussian, or its magnitude if unsigned."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (_SIMULATED, moments.shape[0])
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(moments.device)
    return (x.abs() if unsigned else x) * moments.sqrt()


def input_noise(samples: Tensor, smooth: Tensor, unsigned: bool) -> Tensor:
    """The mean square of what quantization takes from x / smooth in each channel, float32 [K]."""
    return rounded_input(samples, smooth, unsigned).sub_(samples / smooth).square_().mean(0)
