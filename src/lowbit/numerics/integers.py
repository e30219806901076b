"""Rounding to small integers: half to even, or stochastically."""

from __future__ import annotations

import torch
from torch import Tensor


def round_clamp(x: Tensor, low: int, high: int, noise: Tensor | None = None) -> Tensor:
    """Integers in [low, high] as float32: x rounded half to even, or stochastically with uniform `noise` in [0, 1)."""
    value = x.float()
    rounded = value.round() if noise is None else (value + noise.float()).floor_()
    return rounded.clamp_(low, high)


def round_clamp_(value: Tensor, low: int, high: int, noise: Tensor | None = None) -> Tensor:
    """`round_clamp` in the memory of a float32 tensor, which it returns."""
    rounded = value.round_() if noise is None else value.add_(noise).floor_()
    return rounded.clamp_(low, high)


def uniform_noise(shape: tuple[int, ...], seed: int, offset: int, device: torch.device) -> Tensor:
    """Uniform [0, 1) float32 noise that depends on (seed, offset) alone, so that chunks can be made in any order.

    Drawn on the CPU: results are the same on every device.
    """
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + offset) & 0x7FFFFFFFFFFFFFFF)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
