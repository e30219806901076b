"""The low rank L = U D^T that 4 bits beside it serve best: of M = W s [N, K], under the second moments of the input.

The error of a split M = L + R, with R rounded to Q and x' = x / s rounded to x' + e, is

    tr((R - Q) H (R - Q)^T) + tr(Q C Q^T)         H = E[x' x'^T], C = E[e e^T], about diagonal

*Start.* What is left in R costs the noise C and the rounding of R, which grows with R's size in each group. Neither
knows of the correlations in H, so L begins as the best rank r of M under the diagonal metric C + COST mean_g(H_kk + C).
Whitening M itself with H, which is right for an L that is added to a finished Q, costs 0.5 to 1 dB here.

*Refinement.* Given Q, the best L is the leading part of E = M - Q under H: what the rounding lost, weighted by what the
layer sees. In turn Q = rounded(M - L) and L = E H D D^T, D [K, r] orthonormal under H (D^T H D = I) and found by
subspace iteration from the D before it, D <- orthonormal(E^T E H D). No square root of H is needed. Worth 0.5 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.groups import row_chunks
from lowbit.numerics.int4_matmul import GROUP
from lowbit.numerics.low_rank import leading_basis, orthonormal
from lowbit.ops.w4a4_search import lost_to_lowest

COST = 0.008  # what 4 bits lose of a group's energy
REFINEMENTS = 6
_PASSES = 3  # of subspace iteration for the start
_STEPS = 2  # of subspace iteration for each refinement
_PIECE = 1 << 20  # elements


def start_metric(moments: Tensor, noise: Tensor) -> Tensor:
    """The diagonal metric [K] of the start, from E[x'_k^2] and E[e_k^2], both [K]."""
    groups = (moments + noise).view(-1, GROUP).mean(1, keepdim=True).mul(COST).expand(-1, GROUP)
    metric = noise + groups.reshape(-1)
    return metric.clamp_min(float(metric.mean()) * 1e-6)


def low_rank(
    m: Tensor, hessian: Tensor, noise: Tensor, rank: int, refinements: int = REFINEMENTS
) -> tuple[Tensor, Tensor]:
    """U [N, rank] and D [K, rank] for M (float32 [N, K]); needs memory for one more of its size.

    hessian: H [K, K], positive definite, or its diagonal [K]; noise: E[e_k^2] [K].
    """
    n, k = m.shape
    chunks = list(row_chunks(n, k, elements=_PIECE))
    scale = start_metric(_diagonal(hessian), noise).sqrt_()
    basis = leading_basis(lambda: (m[a:b] * scale for a, b in chunks), k, rank, _PASSES, m.device)
    up = torch.cat([(m[a:b] * scale) @ basis[:, :rank] for a, b in chunks])
    down = basis / scale.unsqueeze(1)
    if not refinements:
        return up, down[:, :rank]
    lost, back = torch.empty_like(m), down[:, :rank].t()
    down, seen = _orthonormal(down, hessian)
    for _ in range(refinements):
        for a, b in chunks:
            lost_to_lowest(m[a:b], torch.addmm(m[a:b], up[a:b], back, alpha=-1), lost[a:b])
        for _ in range(_STEPS):
            down, seen = _orthonormal(_step(lost, seen), hessian)
        up, back = lost @ seen[:, :rank], down[:, :rank].t()
    return up, down[:, :rank]


def _step(lost: Tensor, seen: Tensor) -> Tensor:
    """E^T E H D [K, q] from H D, its columns in falling order of what of E they hold."""
    up = lost @ seen
    _, turn = torch.linalg.eigh(up.t() @ up)  # rising
    return lost.t() @ (up @ turn.flip(1))


def _orthonormal(down: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """D [K, q] with the same leading columns' spans and D^T H D = I, and H D."""
    down = orthonormal(down)  # first plainly: then the Cholesky factor is no worse conditioned than H
    seen = _product(hessian, down)
    gram = (down.t() @ seen).double()
    turn = torch.linalg.inv(torch.linalg.cholesky((gram + gram.t()) / 2)).t().float()
    return down @ turn, seen @ turn


def least_squares(down: Tensor, hessian: Tensor) -> Tensor:
    """H D (D^T H D)^-1 [K, r]: E times this is the best U for E and D under H."""
    seen = _product(hessian, down)
    return seen @ inverse(down.t() @ seen)


def inverse(gram: Tensor) -> Tensor:
    """The inverse of a symmetric positive matrix [r, r], the pseudo-inverse where it is singular; in float64."""
    size = gram.diagonal().double().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    scaled = gram.double() * size * size.unsqueeze(1)
    found = torch.linalg.pinv((scaled + scaled.t()) / 2, hermitian=True, rtol=1e-10)
    return (found * size * size.unsqueeze(1)).float()


def _product(hessian: Tensor, x: Tensor) -> Tensor:
    """H x [K, q] for H or its diagonal."""
    return hessian.unsqueeze(1) * x if hessian.dim() == 1 else hessian @ x


def _diagonal(hessian: Tensor) -> Tensor:
    return hessian if hessian.dim() == 1 else hessian.diagonal()
