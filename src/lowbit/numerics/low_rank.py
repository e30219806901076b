"""The low rank that a quantized matrix leaves over: M = L + R, L of rank r kept in high precision, R rounded.

Only the basis V of L's rows is needed, [K, r] and orthonormal: then L = (M V) V^T, row by row. It is found by subspace
iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) over pieces of rows, so M is never held whole in float32:

    V <- orthonormal(M^T M V)                  a few times gives the leading singular vectors of M
    V <- orthonormal(E^T E V),  E = M - rounded(M - L)        refined: L should hold what rounding loses

The second line is SVDQuant's fixed point L = SVD_r(M - Q(M - L)), a step of the iteration at a time. Everything is
float32 and starts from a fixed seed: the same matrix gives the same basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Pieces = Callable[[], Iterator[Tensor]]
Lossy = Callable[[Tensor], Tensor]

_SPARE = 8  # columns beyond the rank: they make the leading ones converge
_SEED = 0x10B17


def leading_basis(pieces: Pieces, columns: int, rank: int, passes: int, device: torch.device) -> Tensor:
    """An orthonormal basis [K, rank + spare] of about the leading right singular vectors of M, the best first.

    `pieces()` yields the rows of M as float32 [n, K], the same in every pass. They are not written to.
    """
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn((columns, min(columns, rank + _SPARE)), generator=generator, dtype=torch.float32, device="cpu")
    basis = orthonormal(start.to(device))
    for _ in range(passes):
        step = _Step(basis)
        for rows in pieces():
            step.add(rows)
        basis = step.next_basis()
    return basis


def refined_basis(pieces: Pieces, basis: Tensor, rank: int, lossy: Lossy, weights: Tensor, passes: int) -> Tensor:
    """The basis [K, rank] with the smallest error of `passes` refinements, the start among them.

    basis: [K, >= rank], best columns first. Pieces are overwritten, so they must be new ones. The error is that of L +
    lossy(M - L), squares weighted by `weights` [K].
    """
    best, least = basis[:, :rank], torch.inf
    for last in range(passes + 1):
        kept, step, error = basis[:, :rank].contiguous(), _Step(basis), 0.0
        for rows in pieces():
            residual = rows - (rows @ kept) @ kept.t()
            rounded = lossy(residual)
            error += float(residual.sub_(rounded).square_().sum(0) @ weights)
            if last < passes:
                step.add(rows.sub_(rounded))
        if error < least:
            best, least = kept, error
        if last < passes:
            basis = step.next_basis()
    return best


def refined_rows(rows: Tensor, basis: Tensor, lossy: Lossy, weights: Tensor, turns: int, dtype: torch.dtype) -> Tensor:
    """The factors U [n, r] in `dtype` with the smallest error of U basis^T + lossy(rows - U basis^T), for each row.

    Least squares and rounding alternate: U fits the rows, then `turns` times what the rounding of the rest leaves
    over. Of all these the best one is kept, row by row. Squared errors are weighted by `weights` [K]. basis: [K, r],
    any full rank.
    """
    solve = basis @ torch.linalg.pinv(basis.t() @ basis, hermitian=True)
    best = (rows @ solve).to(dtype)
    rounded, least = _rounded_rest(rows, best, basis, lossy, weights)
    for _ in range(turns):
        factors = ((rows - rounded) @ solve).to(dtype)
        rounded, error = _rounded_rest(rows, factors, basis, lossy, weights)
        better = (error < least).unsqueeze(1)
        best = torch.where(better, factors, best)
        least = torch.minimum(error, least)
    return best


def _rounded_rest(rows: Tensor, factors: Tensor, basis: Tensor, lossy: Lossy, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`lossy` of what the factors leave of the rows, and its weighted squared error [n]."""
    rest = rows - factors.float() @ basis.t()
    rounded = lossy(rest)
    return rounded, rest.sub_(rounded).square_() @ weights


class _Step:
    """One pass of subspace iteration over the pieces of a matrix."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis
        self.image = torch.zeros_like(basis)  # M^T M V
        self.gram = basis.new_zeros((basis.shape[1], basis.shape[1]))  # V^T M^T M V

    def add(self, rows: Tensor) -> None:
        """Take in some rows."""
        seen = rows @ self.basis
        self.image.addmm_(rows.t(), seen)
        self.gram.addmm_(seen.t(), seen)

    def next_basis(self) -> Tensor:
        """The next V, its columns in falling order of singular values (Rayleigh-Ritz)."""
        _, turn = torch.linalg.eigh(self.gram)  # rising
        return orthonormal(self.image @ turn.flip(1))


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis [K, q] of the columns, in their order; any basis where they are dependent."""
    return torch.linalg.qr(x).Q
