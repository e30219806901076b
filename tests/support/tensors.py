"""Weights to test with: the same numbers on every machine and device."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(n: int = 512, k: int = 512, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values [n, k]: the weight that golden SQNRs are stated for.

    Drawn in float64 on the CPU and cast once, so a smaller dtype holds the same numbers, rounded.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, k), generator=generator, dtype=torch.float64).to(dtype)


def outlier_weight(n: int = 512, k: int = 512, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight [n, k] as trained transformers have them: Gaussian, columns of unlike size, few values far out.

    Columns are scaled by a lognormal (sigma 0.6, so that one in a hundred is four times the median), one value in a
    thousand is ten times larger, and the whole is scaled by 0.02, the usual size of a linear layer's weights.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn((n, k), generator=generator, dtype=torch.float64)
    w *= torch.exp(0.6 * torch.randn((1, k), generator=generator, dtype=torch.float64))
    far = torch.rand((n, k), generator=generator, dtype=torch.float64) < 1e-3
    return (0.02 * torch.where(far, 10 * w, w)).to(dtype)


def widened(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parts with 16-bit scales and factors as float32: what a file of another program may hold."""
    return {k: part.float() if part.dtype in (torch.bfloat16, torch.float16) else part for k, part in parts.items()}
