"""awq: multiply columns of the weight that see much input, and divide the input by the same (arXiv 2306.00978).

    y = (x / s) (W s)^T        stored: W s in few bits, and pre_quant_scale = 1 / s, which multiplies the input

A column that is s times as large loses 1/s as much, as long as it does not set the scale of its group; what that costs
the others is tried out: s = rms(x)^rho over its geometric mean, for rho in 0, 0.05 .. 0.95. The best rho has the least
tr(E H E^T), E being the error of the effective weight with scales searched and weighted by H: a closed form, no data.

What solvers see afterwards is W s and the input x / s, so that any refinement goes on from here: awq+gptq+descent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        rms = moments.sqrt()

        def scale_of(exponent: float) -> Tensor:
            return smoothing_factors(rms, exponent).to(stored)

        rows = [WeightRows.of(w, fmt.plain)]
        scale = scale_of(best_exponent(rows, hessian.to(w.device), rms.square(), scale_of, where))
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


@dataclass(frozen=True)
class WeightRows:
    """Rows [n, K] spread over all of a weight, each of which stands for `share` of its rows, and its bare format."""

    rows: Tensor
    share: float
    plain: Format

    @classmethod
    def of(cls, w: Tensor, plain: Format) -> WeightRows:
        """Up to about 256 rows of a weight [N, K], a copy."""
        n = w.shape[0]
        count = min(n, round_up(_ROWS, plain.row_multiple))
        return cls(w[torch.arange(count, device=w.device) * n // count], n / max(count, 1), plain)


def best_exponent(
    weights: Sequence[WeightRows],
    hessian: Tensor,
    moments: Tensor,
    scale_of: Callable[[float], Tensor],
    where: str = "weight",
) -> float:
    """Of EXPONENTS the one with the least output error of weights that share their input; the first of equals.

    hessian: [K, K] or [K]; moments: [K], by which scales are searched. `scale_of` gives 1 / s [K] for an exponent.
    """
    best, least = 0.0, torch.inf
    for exponent in EXPONENTS:
        error = scaled_error(weights, scale_of(exponent), hessian, moments, where)
        if error < least:
            best, least = exponent, error
    return best


def scaled_error(
    weights: Sequence[WeightRows], scale: Tensor, hessian: Tensor, moments: Tensor, where: str = "weight"
) -> float:
    """tr(E H E^T) of weights stored as W / scale behind an input times scale [K], from their rows.

    hessian: [K, K] or [K], of the input as it was; moments: [K], the same for the search of the stored scales.
    """
    error = 0.0
    for weight in weights:
        parts = quantize_scaled(weight.rows, weight.plain, scale, moments, where)
        decoded = weight.plain.dequantize(parts, (weight.rows.shape[0], weight.rows.shape[1]), torch.float32)
        error += energy(decoded.mul_(scale.float()).sub_(weight.rows.float()), hessian) * weight.share
    return error
