"""The low rank that a quantized matrix leaves over: M = L + R, L of rank r kept in high precision, R rounded.

Only the basis V of L's rows is needed, [K, r] and orthonormal: then L = (M V) V^T, row by row. It is found by subspace
iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) over pieces of rows, so M is never held whole in float32:

    V <- orthonormal(M^T M V)                  a few times gives the leading singular vectors of M
    V <- orthonormal(E^T E V),  E = M - rounded(M - L)        refined: L should hold what rounding loses

The second line is SVDQuant's fixed point L = SVD_r(M - Q(M - L)), a step of the iteration at a time. Everything is
float32 and starts from a fixed seed: the same matrix gives the same basis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.numerics.constants import kept

Pieces = Callable[[], Iterator[Tensor]]
Lossy = Callable[[Tensor], Tensor]

_SPARE = 8  # columns beyond the rank: they make the leading ones converge
_SEED = 0x10B17


class Products(NamedTuple):
    """What a step of subspace iteration needs of a matrix E and a basis V [K, q]."""

    image: Tensor  # E^T E V, [K, q]
    gram: Tensor  # V^T E^T E V, [q, q]

    def next_basis(self) -> Tensor:
        """The next V, its columns in falling order of singular values (Rayleigh-Ritz)."""
        _, turn = torch.linalg.eigh(self.gram.double())  # rising; in float32 LAPACK fails on what is nearly nothing
        return orthonormal(self.image @ turn.flip(1).float())


class Passes(ABC):
    """A matrix M [N, K] that is gone through once for each step of an iteration."""

    @abstractmethod
    def step(self, basis: Tensor) -> Products:
        """Those of M with a basis V [K, q]."""

    @abstractmethod
    def refinement(self, basis: Tensor, rank: int, *, step: bool) -> tuple[float, Products | None]:
        """The error of L + rounded(M - L), L of the first `rank` columns of the basis, at least one.

        And unless `step` is false the products of E = M - rounded(M - L) with the basis. The error is the sum over
        columns of squares, `weights` [K] times those of M - L - rounded(M - L), and where there is a `noise` [K], of an
        input that meets the rounded part, that times those of rounded(M - L).
        """


class PiecePasses(Passes):
    """Of a matrix whose rows `pieces()` yields as float32 [n, K], the same in every pass.

    They are overwritten, so they must be new ones. `lossy` rounds rows; weights, noise: see `Passes.refinement`.
    """

    def __init__(self, pieces: Pieces, lossy: Lossy, weights: Tensor, noise: Tensor | None = None) -> None:
        self._pieces, self._lossy, self._weights, self._noise = pieces, lossy, weights, noise

    def step(self, basis: Tensor) -> Products:
        """See `Passes`."""
        return _products(self._pieces, basis)

    def refinement(self, basis: Tensor, rank: int, *, step: bool) -> tuple[float, Products | None]:
        """See `Passes`."""
        kept, made, error = basis[:, :rank].contiguous(), _no_products(basis), 0.0
        for rows in self._pieces():
            residual = rows - (rows @ kept) @ kept.t()
            rounded = self._lossy(residual)
            error += float(residual.sub_(rounded).square_().sum(0) @ self._weights)
            if self._noise is not None:
                error += float(rounded.square().sum(0) @ self._noise)
            if step:
                _add(made, basis, rows.sub_(rounded))
        return error, made if step else None


def leading_basis(pieces: Pieces, columns: int, rank: int, passes: int, device: torch.device) -> Tensor:
    """An orthonormal basis [K, rank + spare] of about the leading right singular vectors of M, the best first.

    `pieces()` yields the rows of M as float32 [n, K], the same in every pass. They are not written to.
    """
    return leading_basis_of(lambda basis: _products(pieces, basis), columns, rank, passes, device)


def leading_basis_of(
    step: Callable[[Tensor], Products], columns: int, rank: int, passes: int, device: torch.device
) -> Tensor:
    """The same, of a matrix whose products with a basis `step` gives."""
    basis = _start(columns, min(columns, rank + _SPARE), device)
    for _ in range(passes - 1):
        basis = orthonormal(step(basis).image)  # its columns in any order
    return step(basis).next_basis() if passes else basis


@kept(maxsize=4)
def _start(columns: int, count: int, device: torch.device) -> Tensor:
    """Where every search begins. Do not write to it: it is kept, as each weight asks for the same ten times."""
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn((columns, count), generator=generator, dtype=torch.float32, device="cpu")
    return orthonormal(start.to(device))


def refined_basis(passes: Passes, basis: Tensor, rank: int, count: int) -> Tensor:
    """The basis [K, rank] with the smallest error of `count` refinements, the start among them.

    basis: [K, >= rank], best columns first.
    """
    best, least = basis[:, :rank], torch.inf
    for last in range(count + 1):
        error, products = passes.refinement(basis, rank, step=last < count)
        if error < least:
            best, least = basis[:, :rank].contiguous(), error
        if products is not None:
            basis = products.next_basis()
    return best


def refined_rows(rows: Tensor, basis: Tensor, lossy: Lossy, weights: Tensor, turns: int, dtype: torch.dtype) -> Tensor:
    """The factors U [n, r] in `dtype` with the smallest error of U basis^T + lossy(rows - U basis^T), for each row.

    Least squares and rounding alternate: U fits the rows, then `turns` times what the rounding of the rest leaves
    over. Of all these the best one is kept, row by row. Squared errors are weighted by `weights` [K]. basis: [K, r],
    any full rank.
    """
    solve = least_squares(basis)
    best = (rows @ solve).to(dtype)
    rounded, least = _rounded_rest(rows, best, basis, lossy, weights)
    for _ in range(turns):
        factors = ((rows - rounded) @ solve).to(dtype)
        rounded, error = _rounded_rest(rows, factors, basis, lossy, weights)
        better = (error < least).unsqueeze(1)
        best = torch.where(better, factors, best)
        least = torch.minimum(error, least)
    return best


def least_squares(basis: Tensor) -> Tensor:
    """What rows [n, K] are multiplied with to give the factors [n, r] of a basis [K, r] that fit them best: [K, r]."""
    return basis @ torch.linalg.pinv(basis.t() @ basis, hermitian=True)


def _rounded_rest(rows: Tensor, factors: Tensor, basis: Tensor, lossy: Lossy, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`lossy` of what the factors leave of the rows, and its weighted squared error [n]."""
    rest = rows - factors.float() @ basis.t()
    rounded = lossy(rest)
    return rounded, rest.sub_(rounded).square_() @ weights


def _products(pieces: Pieces, basis: Tensor) -> Products:
    made = _no_products(basis)
    for rows in pieces():
        _add(made, basis, rows)
    return made


def _no_products(basis: Tensor) -> Products:
    return Products(torch.zeros_like(basis), basis.new_zeros((basis.shape[1], basis.shape[1])))


def _add(made: Products, basis: Tensor, rows: Tensor) -> None:
    """Take in some rows [n, K]."""
    seen = rows @ basis
    made.image.addmm_(rows.t(), seen)
    made.gram.addmm_(seen.t(), seen)


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis [K, q] of the columns, in their order; any basis where they are dependent."""
    return torch.linalg.qr(x).Q
