"""error_lora: the low-rank correction that makes up for most of what quantization lost of a layer's output.

With E = W - Wq and H = E[x x^T], the matrix C of rank r with the least tr((E - C) H (E - C)^T) is U U^T E, U being the
leading eigenvectors of E H E^T: the truncated SVD of the whitened error (QERA, arXiv 2410.06040), without the inverse
of H. It projects E, so it lowers the error for any input whatever, and never raises it: statistics only decide how
much of it. Without them H is the identity.

Rounding errors have a flat spectrum: without H, a rank of r takes away little more than r / min(N, K) of the squares.
H gives them the input's, and then the same rank is worth far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.numerics.low_rank import orthonormal

from .base import Statistics
from .curvature import second_moments, shrinkage

_PASSES = 12  # of subspace iteration: the spectrum is flat
_SPARE = 16
_SEED = 0xE44


def error_lora(
    error: Tensor,
    rank: int,
    statistics: Statistics | None = None,
    *,
    mean_is_corrected: bool = False,
    where: str = "weight",
) -> tuple[Tensor, Tensor]:
    """(down [r, K], up [N, r]) as float32: up @ down is the best correction to add to the quantized weight.

    error: W - Wq, [N, K], float32. `mean_is_corrected`: the layer's bias makes up for the mean error already; the
    correction then gives nothing for the mean input (down @ mean = 0), and the covariance counts instead of H.

    r is at most N and K. Raises `SolverError` for a rank below 1 and for statistics of another layer.
    """
    if rank < 1:
        raise SolverError(f"{where}: the rank of a correction is {rank}; give 1 or more, such as 32")
    n, k = error.shape
    rank = min(rank, n, k)
    size = error.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) if error.numel() else error.new_ones(())
    unit = error / size  # so that squares fit into float32
    hessian = _hessian(statistics, k, error.device, where)
    mean = None if statistics is None or not mean_is_corrected else statistics.mean
    if mean is not None and hessian is not None:
        unit, hessian = _without_mean(unit, hessian, mean.to(error.device))
    up = _leading_rows(unit, hessian, rank)
    down = (up.t() @ unit).mul_(size)
    balance = torch.linalg.vector_norm(down, dim=1).sqrt()  # the columns of up have norm 1: halve the range of both
    balance = torch.where(balance > 0, balance, 1.0)
    return down / balance.unsqueeze(1), up * balance


def _hessian(statistics: Statistics | None, k: int, device: torch.device, where: str) -> Tensor | None:
    """H [K, K], shrunk, or its diagonal [K], of mean 1; None for the identity."""
    if statistics is None or statistics.column_weights(k, where) is None:
        return None
    hessian = statistics.combined
    assert hessian is not None
    hessian = hessian.to(device, torch.float32)
    if hessian.dim() == 2:
        hessian = second_moments(hessian, shrinkage(statistics.total_tokens, k, broad=statistics.broad), None)
    diagonal = hessian.diagonal() if hessian.dim() == 2 else hessian
    return hessian / diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)


def _times(rows: Tensor, hessian: Tensor | None) -> Tensor:
    """Rows [n, K] times H."""
    if hessian is None:
        return rows
    return rows * hessian if hessian.dim() == 1 else rows @ hessian


def _without_mean(error: Tensor, hessian: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The error with nothing of it at the mean input, in the way that changes the rest least."""
    direction = _times(mean.unsqueeze(0), hessian)[0]
    length = float(direction @ mean)
    if length <= 0:
        return error, hessian
    return error - torch.outer(error @ mean, direction / length), hessian


def _leading_rows(error: Tensor, hessian: Tensor | None, rank: int) -> Tensor:
    """The leading eigenvectors [N, r] of E H E^T, about, by subspace iteration."""
    n = error.shape[0]
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn((n, min(n, rank + _SPARE)), generator=generator, dtype=torch.float32, device="cpu")
    basis = orthonormal(start.to(error.device))
    for _ in range(_PASSES):
        basis = orthonormal(error @ _times(basis.t() @ error, hessian).t())
    seen = basis.t() @ error
    _, turn = torch.linalg.eigh(_times(seen, hessian) @ seen.t())  # rising
    return basis @ turn.flip(1)[:, :rank]
