"""awq: multiply columns of the weight that see much input, and divide the input by the same (arXiv 2306.00978).

    y = (x / s) (W s)^T        stored: W s in few bits, and pre_quant_scale = 1 / s, which multiplies the input

A column that is s times as large loses 1/s as much, as long as it does not set the scale of its group; what that costs
the others is tried out: s = rms(x)^rho over its geometric mean, for rho in 0, 0.05 .. 0.95. The best rho has the least
tr(E H E^T), E being the error of the effective weight with scales searched and weighted by H: a closed form, no data.

What solvers see afterwards is W s and the input x / s, so that any refinement goes on from here: awq+gptq+descent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format, check_finite
from lowbit.formats.parts import FLOATS, Parts
from lowbit.formats.scale_search import best_params
from lowbit.numerics.groups import round_up
from lowbit.numerics.smoothing import smoothing_factors

from .base import Statistics, register_solver
from .curvature import energy

EXPONENTS = tuple(i / 20 for i in range(20))
_ROWS = 256  # of the weight, spread over all of it, on which the exponents are compared


@register_solver("awq")
def awq(
    w: Tensor, fmt: Format, statistics: Statistics | None = None, *, where: str = "weight", seed: int | None = None
) -> Parts:
    """The parts of W s, and 1 / s as `pre_quant_scale`. See the module and `Solver`.

    Raises `SolverError` for a format without a pre_quant_scale, and without second moments of the input.
    """
    if not fmt.pre_quant_scale:
        raise SolverError(
            f"{where}: awq stores a pre_quant_scale, and {fmt} has none; give the format the field "
            "pre_quant_scale=true, or use scale_search"
        )
    fmt.check_weight(w, where)
    moments = None if statistics is None else statistics.column_weights(w.shape[1], where)
    if moments is None or statistics is None:
        raise SolverError(f"{where}: awq needs second moments of the layer's input, and there are none; calibrate")
    moments = moments.to(w.device)
    stored = fmt.part_dtypes(w.dtype)["pre_quant_scale"]
    scale = torch.ones(w.shape[1], dtype=stored, device=w.device)
    if w.numel():
        check_finite(w, where)
        hessian = statistics.combined
        assert hessian is not None
        scale = best_scale([w], fmt.plain, hessian.to(w.device), moments.sqrt(), stored, where)
    return {**quantize_scaled(w, fmt.plain, scale, moments, where, seed), "pre_quant_scale": scale}


def quantize_scaled(
    w: Tensor, plain: Format, scale: Tensor, moments: Tensor, where: str = "weight", seed: int | None = None
) -> Parts:
    """The parts of W / scale, its scales searched for an input of second moments `moments` [K] times scale^2."""
    scaled = w.float() / scale.float()
    if not w.numel():
        return plain.quantize(scaled.to(w.dtype), where=where, seed=seed)
    # The parameters are to have the dtypes that the source asks for; the codes are of the exact weight.
    like = scaled.to(w.dtype if w.dtype in FLOATS else torch.float32)
    params = best_params(
        like if bool(like.isfinite().all()) else scaled, plain, moments * scale.float().square(), where
    )
    return plain.quantize(scaled, params=params, where=where, seed=seed)


def best_scale(
    weights: Sequence[Tensor], plain: Format, hessian: Tensor, rms: Tensor, stored: torch.dtype, where: str = "weight"
) -> Tensor:
    """1 / s [K] in dtype `stored` for weights [N_i, K] that share their input: of all exponents the least error.

    hessian: [K, K] or [K]; rms: the root of its diagonal. The first of equals, so no scaling where nothing gains.
    """
    moments = rms.square()
    samples = [(rows := _some_rows(w, plain), w.shape[0] / max(rows.shape[0], 1)) for w in weights]
    best, least = torch.ones_like(rms, dtype=stored), torch.inf
    for exponent in EXPONENTS:
        scale = smoothing_factors(rms, exponent).to(stored)
        error = 0.0
        for rows, share in samples:
            parts = quantize_scaled(rows, plain, scale, moments, where)
            decoded = plain.dequantize(parts, (rows.shape[0], rows.shape[1]), torch.float32).mul_(scale.float())
            error += energy(decoded.sub_(rows.float()), hessian) * share
        if error < least:
            best, least = scale, error
    return best


def _some_rows(w: Tensor, plain: Format) -> Tensor:
    """Up to about _ROWS rows, spread over all of them."""
    n = w.shape[0]
    count = min(n, round_up(_ROWS, plain.row_multiple))
    return w[torch.arange(count, device=w.device) * n // count]
