"""Sums of squares over the rows of a weight, of what became of it and of the difference, whatever its magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-30  # a sum of squares below it may have lost some: float32 begins at 1e-38


def row_energies(rows: Tensor, approx: Tensor) -> Tensor:
    """float32 [3, n]: sums over each row [K] of `rows` squared, of approx - rows, of approx, which is overwritten."""
    energy = _energy(approx)
    noise = _energy(approx.sub_(rows))
    return torch.stack([_energy(rows), noise, energy])


def exact_row_energies(rows: Tensor, approx: Tensor) -> Tensor:
    """The same in float64, which holds the square of every float32."""
    rows, approx = rows.double(), approx.double()
    return torch.stack([x.square().sum(dim=1) for x in (rows, approx - rows, approx)])


def beyond_float32(sums: Tensor, rows: Tensor) -> Tensor:
    """Bool [n]: where float32 may not hold the squares that `sums` [3, n] add up, of values near 1e-15 or 1e19."""
    small = sums[0] < _LEAST
    if bool(small.any()):
        small[small.clone()] = rows[small].any(dim=1)  # rows of zeros have nothing to lose
    return small | ~sums.isfinite().all(dim=0)


def _energy(rows: Tensor) -> Tensor:
    """The sum of squares of each row [n]; the norm is the quickest way there."""
    return torch.linalg.vector_norm(rows, dim=1).square_()
