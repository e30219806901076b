"""error_lora: the low-rank correction that makes up for most of what quantization lost of a layer's output.

With E = W - Wq and H = E[x x^T], the matrix C of rank r with the least tr((E - C) H (E - C)^T) is U U^T E, U being the
leading eigenvectors of E H E^T: the truncated SVD of the whitened error (QERA, arXiv 2410.06040), without the inverse
of H. It projects E, so it lowers the error for any input whatever, and never raises it: statistics only decide how
much of it. Without them H is the identity.

Where the layer's bias makes up for the mean error E m already, what is left is E (x - m) - C x, and a projection would
take the mean error away a second time. With the covariance V = H - m m^T and t = m^T V^-1 m, the best C = U D has
D = U^T E (I - m (V^-1 m)^T / (1 + t)), and U is the leading eigenvectors of E (V - m m^T / (1 + t)) E^T. With a small
mean that is the projection; with one that is nearly all of the input, D m = U^T E m / (1 + t) is nearly nothing. It
lowers the mean squared error of inputs like those of the statistics; for a single one it promises nothing.

Rounding errors have a flat spectrum: without H, a rank of r takes away little more than r / min(N, K) of the squares.
H gives them the input's, and then the same rank is worth far more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.numerics.cholesky import cholesky
from lowbit.numerics.low_rank import orthonormal

from .base import Statistics
from .curvature import second_moments, shrinkage

_PASSES = 12  # of subspace iteration: the spectrum is flat
_SPARE = 16
_SEED = 0xE44
_LEAST = 1e-6  # of the mean variance: what a channel without any counts


def error_lora(
    error: Tensor,
    rank: int,
    statistics: Statistics | None = None,
    *,
    mean_is_corrected: bool = False,
    where: str = "weight",
) -> tuple[Tensor, Tensor]:
    """(down [r, K], up [N, r]) as float32: up @ down is the best correction to add to the quantized weight.

    error: W - Wq, [N, K], float32. `mean_is_corrected`: the layer's bias makes up for the mean error already, by the
    `sure_mean` of the statistics.

    r is at most N and K. Raises `SolverError` for a rank below 1 and for statistics of another layer.
    """
    if rank < 1:
        raise SolverError(f"{where}: the rank of a correction is {rank}; give 1 or more, such as 32")
    n, k = error.shape
    rank = min(rank, n, k)
    size = error.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) if error.numel() else error.new_ones(())
    unit = error / size  # so that squares fit into float32
    seen = _seen(statistics, k, error.device, where, mean_is_corrected=mean_is_corrected)
    up = _leading_rows(unit, seen, rank)
    down = seen.right_factor(up.t() @ unit).mul_(size)
    balance = torch.linalg.vector_norm(down, dim=1).sqrt()  # the columns of up have norm 1: halve the range of both
    balance = torch.where(balance > 0, balance, 1.0)
    return down / balance.unsqueeze(1), up * balance


@dataclass(frozen=True)
class _Seen:
    """What the error of the weight meets, of inputs with a mean square of 1.

    moments: H [K, K], its diagonal [K], or None for the identity. Where a bias corrects the mean it is V, with `mean`,
    m [K], and `turned`, V^-1 m / (1 + t) [K]: see the module.
    """

    moments: Tensor | None
    mean: Tensor | None = None
    turned: Tensor | None = None

    def times(self, rows: Tensor) -> Tensor:
        """Rows [n, K] times H, or V - m m^T / (1 + t)."""
        if self.moments is None:
            return rows
        found = rows * self.moments if self.moments.dim() == 1 else rows @ self.moments
        if self.mean is None or self.turned is None:
            return found
        share = 1 - self.mean @ self.turned  # 1 / (1 + t)
        return found - torch.outer(rows @ self.mean, self.mean * share)

    def right_factor(self, rows: Tensor) -> Tensor:
        """D [r, K] of rows U^T E."""
        if self.mean is None or self.turned is None:
            return rows
        return rows - torch.outer(rows @ self.mean, self.turned)


def _seen(statistics: Statistics | None, k: int, device: torch.device, where: str, *, mean_is_corrected: bool) -> _Seen:
    """Second moments, shrunk; beside a bias those around the mean."""
    if statistics is None or statistics.column_weights(k, where) is None:
        return _Seen(None)
    moments, mean = statistics.combined, statistics.sure_mean if mean_is_corrected else None
    assert moments is not None
    moments = moments.to(device, torch.float32)
    if mean is not None:
        mean = mean.to(device, torch.float32)
        moments = moments - (torch.outer(mean, mean) if moments.dim() == 2 else mean.square())
    if moments.dim() == 2:
        moments = second_moments(moments, shrinkage(statistics.total_tokens, k, broad=statistics.broad), None)
    diagonal = moments.diagonal() if moments.dim() == 2 else moments
    limits, scale = torch.finfo(torch.float32), diagonal.mean()
    if mean is not None:  # inputs that do not vary, as of one token: not the variance but the mean gives the unit
        scale = torch.maximum(scale, limits.eps * mean.square().mean())
    scale = scale.clamp_min(limits.tiny)
    moments = moments / scale
    return _Seen(moments) if mean is None else _beside_a_bias(moments, mean / scale.sqrt())


def _beside_a_bias(covariance: Tensor, mean: Tensor) -> _Seen:
    """`_Seen` where a bias corrects the mean; with the variances alone where V has no triangular factor."""
    if covariance.dim() == 2:
        factor = cholesky(covariance)
        if factor is None:
            factor = cholesky(covariance.double())
        if factor is not None:
            solved = torch.cholesky_solve(mean.unsqueeze(1).to(factor.dtype), factor).squeeze(1)
            return _Seen(covariance, mean, (solved / (1 + mean.to(solved.dtype) @ solved)).float())
        covariance = covariance.diagonal()
    covariance = covariance.clamp_min(_LEAST)
    solved = mean / covariance
    return _Seen(covariance, mean, solved / (1 + mean @ solved))


def _leading_rows(error: Tensor, seen: _Seen, rank: int) -> Tensor:
    """The leading eigenvectors [N, r] of E M E^T, M as in `_Seen.times`, about, by subspace iteration."""
    n = error.shape[0]
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn((n, min(n, rank + _SPARE)), generator=generator, dtype=torch.float32, device="cpu")
    basis = orthonormal(start.to(error.device))
    for _ in range(_PASSES):
        basis = orthonormal(error @ seen.times(basis.t() @ error).t())
    rows = basis.t() @ error
    _, turn = torch.linalg.eigh(seen.times(rows) @ rows.t())  # rising
    return basis @ turn.flip(1)[:, :rank]
