"""How much an error of the weight costs at the output: tr(E H E^T) with H = E[x x^T] of the layer's input.

At the output of the model it costs tr(G E H E^T), G = E[g g^T] of the gradient at the layer's output (`row_coupling`).

H is measured from T tokens. With T not far above K its small eigenvalues are noise, and a solver that trusts them fits
the noise; so H is shrunk toward its diagonal first, H <- (1 - a) H + a diag(H). For rounding that beats damping with a
multiple of the identity at every T / K: the diagonal is known well from few tokens.

With H = L D L^T (L unit lower triangular) the error is the sum over columns j of D_j |E_j + sum over i > j of E_i
L_ij|^2. Rounding from the last column to the first, each one corrected by the errors already made, leaves D_j Delta^2 /
12 a weight (LDLQ, the same as GPTQ: arXiv 2210.17323, 2307.13304), against H_jj Delta^2 / 12 of rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.block_diagonal import blocks
from lowbit.numerics.cholesky import cholesky
from lowbit.numerics.groups import row_chunks
from lowbit.ops.encode import decode_rows

from .lazy import lazy

_SHRUNK, _MOST_SHRUNK = 0.4, 0.3
_LEAST_SHRUNK, _LEAST_SHRUNK_BROAD = 0.2, 0.05
_DEAD = 1e-6  # of the mean second moment: what a channel without any gets, so that H has an inverse
_LEAST = 2.0**-126  # where all channels are dead: the inverse of this is still a float32
_PIECE = 1 << 22  # elements of a temporary
_ROWS = 64  # that are put in another order at a time
_BLOCK = 192  # along the diagonal of a symmetric matrix of which one triangle is multiplied


def shrinkage(tokens: int, k: int, *, broad: bool = False) -> float:
    """How far to shrink H of K channels, measured from T tokens, toward its diagonal: 0.4 K / T, at most 0.3.

    At least 0.05 of `broad` tokens, 0.2 of others. On tokens of the calibration's own kind 0.05 is best from eight
    tokens a channel on, and on other kinds after a calibration on many (int8 weights of a sentence model: 0.39, 0.38,
    0.41, 0.41 of plain rounding's error at 0.02, 0.05, 0.1, 0.2). After one kind alone 0.2 is better on another (4
    bits: 0.38, 0.36, 0.34, 0.30), and costs little on its own. What a user will run is another kind.
    """
    least = _LEAST_SHRUNK_BROAD if broad else _LEAST_SHRUNK
    return min(_MOST_SHRUNK, max(least, _SHRUNK * k / max(tokens, 1)))


def prepared_hessian(hessian: Tensor, fmt: Format) -> Tensor:
    """H [K, K] in the basis in which the format rounds (`Format.prepare`): R H R^T; the same tensor without one."""
    once = fmt.prepare(hessian)
    return hessian if once is hessian else fmt.prepare(once.t().contiguous())


def second_moments(hessian: Tensor, amount: float, factor: Tensor | None) -> Tensor:
    """H shrunk by `amount` toward its diagonal, in units in which an error counts `factor` [K]. A new tensor [K, K]."""
    shrunk = hessian * (1 - amount)
    diagonal = hessian.diagonal()
    shrunk.diagonal().copy_(diagonal)
    if factor is not None:
        shrunk.mul_(factor.unsqueeze(0)).mul_(factor.unsqueeze(1))
    live = shrunk.diagonal()
    live.clamp_(min=max(float(live.mean()) * _DEAD, _LEAST))
    return shrunk


def no_second_moment(where: str) -> str:
    """What is said of a layer whose H is not positive definite."""
    return f"{where}: the second moments of its input are no positive definite matrix; calibrate it again"


class NotPositiveDefiniteError(SolverError):
    """H has no triangular factor: it is not a second moment."""


class Curvature:
    """H [K, K] as solvers use it, with its triangular factor, made when first asked for."""

    def __init__(self, hessian: Tensor, where: str) -> None:
        self.hessian = hessian
        self._where = where

    @lazy
    def factor(self) -> tuple[Tensor, Tensor]:
        """(order, lower): columns by rising H_kk, and the unit lower triangular L of H in that order, float32 [K, K].

        The last column is rounded first, so channels with the largest input go first and all others make up for them.
        Raises `SolverError` when H is not positive definite, in float64 either.
        """
        order = self.hessian.diagonal().argsort()
        lower = unit_lower(arranged(self.hessian, order))
        if lower is None:
            raise NotPositiveDefiniteError(no_second_moment(self._where))
        return order, lower


def arranged(matrix: Tensor, order: Tensor) -> Tensor:
    """`matrix[order][:, order]`, on a CPU some rows at a time: a third of the time, as they stay in the cache."""
    if matrix.device.type != "cpu":
        return matrix.index_select(0, order).index_select(1, order)
    found = torch.empty_like(matrix)
    for start in range(0, len(order), _ROWS):
        rows = matrix.index_select(0, order[start : start + _ROWS])
        torch.index_select(rows, 1, order, out=found[start : start + _ROWS])
    return found


def unit_lower(matrix: Tensor) -> Tensor | None:
    """The unit lower triangular L of a symmetric float32 matrix L D L^T; None for one that is not positive definite.

    What float32 cannot factor is tried in float64.
    """
    lower = cholesky(matrix)
    if lower is None:
        lower = cholesky(matrix.double())
    return None if lower is None else lower.div_(lower.diagonal().clone()).float()


def output_error(
    w: Tensor, fmt: Format, parts: Parts, hessian: Tensor | None, outputs: Tensor | None = None
) -> tuple[float, float]:
    """tr(G E H E^T) and tr(G W H W^T): what the parts lose of a weight [N, K], and the output they lose it from.

    hessian: H [K, K], its diagonal [K], or None for the identity. outputs: G [N, N] or its blocks [B, b, b], or None
    for the identity. Sums are float64 over pieces of float32.
    """
    return output_loss(w, fmt, parts, hessian, outputs), output_signal(w, hessian, outputs)


def output_loss(w: Tensor, fmt: Format, parts: Parts, hessian: Tensor | None, outputs: Tensor | None = None) -> float:
    """The first of `output_error`."""
    lost = 0.0
    whole = None if outputs is None else w.new_empty(w.shape, dtype=torch.float32)
    for start, stop in row_chunks(w.shape[0], w.shape[1], fmt.row_multiple, _PIECE):
        error = decode_rows(fmt, parts, w.shape[1], start, stop).sub_(w[start:stop].float())
        if whole is None:
            lost += energy(error, hessian)
        else:
            whole[start:stop] = error
    return lost if whole is None else energy(whole, hessian, outputs)


def output_signal(w: Tensor, hessian: Tensor | None, outputs: Tensor | None = None) -> float:
    """The second of `output_error`."""
    if outputs is not None:
        return energy(w.float(), hessian, outputs)
    pieces = row_chunks(w.shape[0], w.shape[1], elements=_PIECE)
    return sum(energy(w[start:stop].float(), hessian) for start, stop in pieces)


def energy(rows: Tensor, hessian: Tensor | None, outputs: Tensor | None = None) -> float:
    """tr(G X H X^T) of float32 rows [n, K]; without `outputs`, G [n, n] or its blocks [B, b, b], tr(X H X^T)."""
    if outputs is not None and outputs.dim() == 3:
        return sum(energy(rows[here], hessian, block) for here, block in blocks(outputs))
    if outputs is None:
        if hessian is None:
            return float(torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2)
        if hessian.dim() == 1:
            return float((rows * hessian).mul_(rows).sum(dtype=torch.float64))
        return 2 * _dot(_times_half(rows, hessian), rows)
    if hessian is None or hessian.dim() == 1:
        weighted = rows if hessian is None else rows * hessian
        return 2 * _dot(_half_times(outputs, rows), weighted)
    if rows.shape[0] > rows.shape[1]:
        return 2 * _dot(_half_times(outputs, rows), rows @ hessian)
    return 2 * _dot(outputs @ rows, _times_half(rows, hessian))


def _dot(made: Tensor, other: Tensor) -> float:
    """The sum of the products of two matrices, the first overwritten."""
    return float(made.mul_(other).sum(dtype=torch.float64))


def _times_half(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ T, T + T^T = a symmetric matrix: half of it, or its upper triangle, which is half of the work."""
    out = torch.empty_like(rows)
    for here, before in _blocks(matrix):
        torch.mm(rows[:, here], matrix[here, here], out=out[:, here]).mul_(0.5)
        if before.stop:
            out[:, here].addmm_(rows[:, before], matrix[before, here])
    return out


def _half_times(matrix: Tensor, rows: Tensor) -> Tensor:
    """T^T @ rows of the same T."""
    out = torch.empty_like(rows)
    for here, before in _blocks(matrix):
        torch.mm(matrix[here, here], rows[here], out=out[here]).mul_(0.5)
        if before.stop:
            out[here].addmm_(matrix[here, before], rows[before])
    return out


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks along the diagonal, and what is before each. One on a GPU, for which small products are no less work."""
    n = matrix.shape[0]
    size = _BLOCK if matrix.device.type == "cpu" else max(n, 1)
    return ((slice(start, min(start + size, n)), slice(0, start)) for start in range(0, n, size))
