"""Grids, and numbers of few bits whose sums float32 does not round."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.grid import Grid
from lowbit.numerics.levels import Levels


def exact(count: int, n: int, low: int, high: int, unit: float, seed: int) -> Tensor:
    """Multiples of a power of two, few enough bits for sums of their products to be exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (count, n), generator=generator).float() * unit


def exact_grid(levels: Levels, count: int, n: int, columns: int, *, zero: bool) -> Grid:
    """A grid with steps that are powers of two, some of them zero, and with targets of few bits."""
    units = -(-count // columns)
    step = torch.exp2(exact(units, n, -2, 0, 1.0, 1))
    step[:, ::7] = 0
    zeros = exact(units, n, -4, 4, 0.25, 2) if zero else None
    return Grid(exact(count, n, -64, 64, 2**-5, 3), step, levels, columns, zero=zeros)
