"""Measures of error. There is no cosine here: it is blind to scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(reference: Tensor, approx: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, 10 log10(sum r^2 / sum (r - a)^2), summed in float64.

    Infinite when nothing was lost (an all-zero reference kept as zeros included), minus infinity when noise was made
    out of nothing, NaN when `approx` holds a NaN.
    Raises ValueError for different shapes and for a reference that is not finite.
    """
    if reference.shape != approx.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(approx.shape)}")
    r = reference.detach().to("cpu", torch.float64)
    if not torch.isfinite(r).all():
        raise ValueError("the reference is not finite")
    signal = r.square().sum().item()
    noise = (r - approx.detach().to("cpu", torch.float64)).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else (math.nan if math.isnan(noise) else -math.inf)


def assert_sqnr_within(reference: Tensor, approx: Tensor, expected: float, tolerance: float = 0.05) -> None:
    """The SQNR is `expected` dB to both sides: a gain that nobody can explain is a defect of the measurement."""
    measured = sqnr(reference, approx)
    assert abs(measured - expected) <= tolerance, f"SQNR {measured:.3f} dB, expected {expected:.3f} +- {tolerance} dB"
