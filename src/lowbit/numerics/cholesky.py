"""The lower triangular factor of a symmetric positive definite matrix, by blocks of columns.

A block of columns of L (A = L L^T) is what the blocks before it leave of A's, solved with the block's own factor:

    P = A[j:, j] - L[j:, :j] L[j, :j]^T,    L[j, j] = cholesky(P[j]),    L[below, j] = P[below] L[j, j]^-T

so that nearly all of the work is matrix products, which on a CPU are faster than LAPACK's own
factorization (`benchmarks/cholesky.py`: 1.4 to 1.8 times from 768 columns on). The rounding errors are alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 192  # of a block
_LARGE = 2 * _COLUMNS  # up to here the blocks gain nothing


def cholesky(matrix: Tensor) -> Tensor | None:
    """L [K, K] of a symmetric matrix, float32 or float64; None if that is not positive definite.

    Zero above the diagonal. Columns lie one after the other, as LAPACK has them.
    """
    k = matrix.shape[0]
    if matrix.device.type != "cpu" or k <= _LARGE:
        return _plain(matrix)
    lower = matrix.new_zeros((k, k)).t()
    for start in range(0, k, _COLUMNS):
        stop = min(start + _COLUMNS, k)
        left = torch.addmm(matrix[start:, start:stop], lower[start:, :start], lower[start:stop, :start].t(), alpha=-1)
        factor = _plain(left[: stop - start])
        if factor is None:
            return None
        lower[start:stop, start:stop] = factor
        if stop < k:
            below = torch.linalg.solve_triangular(factor.t(), left[stop - start :], upper=True, left=False)
            lower[stop:, start:stop] = below
    return lower


def _plain(matrix: Tensor) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else factor
