"""svdquant: smoothing factors, low rank and scales of a W4A4 layer, from statistics of its input (arXiv 2411.05007).

1. Smoothing factors with the least estimated output error, of the weight's and the activations' rounding
   (`svdquant_smoothing`).
2. The low rank that leaves least of both in the residual, refined against its rounding (`svdquant_low_rank`).
3. For each group of the residual the scale with the least error, weighted by what the layer sees.

Refinements (`gptq`, `descent`) then choose the codes of the residual. Layers that share their input, such as query, key
and value, may share one smoothing and one proj_down (`svdquant_shared`): a runtime then does that work once. So may
those of the data-free fit (`shared_fit`).

With the diagonal of H alone the low rank is refined under it; without samples the activations' rounding is measured on
Gaussian input of those second moments. Without any second moments this is the format's own data-free fit with a scale
search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import SolverError, WeightError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.formats.scale_search import search_rows
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.ops.w4a4_search import STEPS, lost_to_lowest, searched_scales

from .base import Statistics, register_solver
from .curvature import second_moments, shrinkage
from .scale_search import scale_search
from .svdquant_low_rank import least_squares, low_rank
from .svdquant_smoothing import calibrated_smoothing, simulated_input

_SAMPLE = 1 << 16  # elements of the rows that the smoothing search looks at


@register_solver("svdquant")
def svdquant(
    w: Tensor, fmt: Format, statistics: Statistics | None = None, *, where: str = "weight", seed: int | None = None
) -> Parts:
    """Choose all parameters of a W4A4 layer, then round to nearest, or stochastically with a `seed`. See `Solver`.

    Without second moments it is `scale_search`. Raises `SolverError` for a format without a low-rank branch.
    """
    if statistics is None or statistics.hessian is None or not w.numel():
        return scale_search(w, fmt, None, where=where, seed=seed)
    return svdquant_shared([w], fmt, statistics, where=where, seed=seed)[0]


def svdquant_shared(
    weights: Sequence[Tensor],
    fmt: Format,
    statistics: Statistics,
    *,
    where: str = "weight",
    seed: int | None = None,
) -> list[Parts]:
    """The parts of weights [N_i, K] that share their input, all with the same smooth_factor and proj_down.

    With a `seed`, weight i is rounded stochastically with seed + i.

    Raises `SolverError` when the format has no low-rank branch, the weights differ in K or dtype, or there are no
    second moments; `WeightError` for a weight that cannot be stored.
    """
    if not isinstance(fmt, SvdquantW4A4):
        raise SolverError(f"{where}: {fmt.name} has no low-rank branch, so svdquant does not apply; use scale_search")
    _check_alike(weights, fmt, where)
    moments = statistics.column_weights(weights[0].shape[1], where)
    if moments is None:
        raise SolverError(
            f"{where}: svdquant needs second moments of the layer's input; calibrate, or use scale_search"
        )
    if not bool(moments.any()):
        if len(weights) == 1:
            return [scale_search(weights[0], fmt, None, where=where, seed=seed)]
        return shared_fit(weights, fmt, None, where=where, seed=seed, search=True)
    layer = _Layer(list(weights), fmt, _on(statistics, weights[0].device), where)
    return [
        fmt.quantize(w, params=params, seed=None if seed is None else seed + i, where=where)
        for i, (w, params) in enumerate(layer.solved())
    ]


def shared_fit(
    weights: Sequence[Tensor],
    fmt: Format,
    columns: Tensor | None,
    *,
    where: str = "weight",
    seed: int | None = None,
    search: bool,
) -> list[Parts]:
    """`rtn` or, with `search`, `scale_search` of weights [N_i, K] with one smooth_factor and one proj_down.

    columns: what an error in each column costs, [K], or None. The shared parameters are the format's own fit of all
    rows together. Raises as `svdquant_shared`.
    """
    _check_alike(weights, fmt, where)
    shared, made = fmt.fit_shared(torch.cat(list(weights))), []
    for i, w in enumerate(weights):
        found: Parts = {}
        for start, stop in fmt.row_ranges(w.shape[0], w.shape[1]):
            rows = fmt.prepared(w, start, stop, where)
            params = fmt.fit_stored(rows, shared, w.dtype, where)
            params = search_rows(rows, fmt, params, columns) if search else params
            fmt.store_rows(found, params, tuple(w.shape), start)
        made.append(fmt.quantize(w, params=found, seed=None if seed is None else seed + i, where=where))
    return made


def _check_alike(weights: Sequence[Tensor], fmt: Format, where: str) -> None:
    for w in weights:
        fmt.check_weight(w, where)
    if len({(w.shape[1], w.dtype, w.device) for w in weights}) != 1:
        raise SolverError(f"{where}: weights that share proj_down need one K, one dtype and one device")


def _on(statistics: Statistics, device: torch.device) -> Statistics:
    """The statistics that are used here on a device, in float32."""

    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device, torch.float32)

    return replace(
        statistics,
        hessian=move(statistics.combined),
        held_out=None,
        samples=move(statistics.samples),
        tokens=statistics.total_tokens,
        held_out_tokens=0,
    )


@dataclass(frozen=True)
class _Split:
    """What the weights share, and the low rank's other factor.

    smooth [K] and down [K, R] are as stored; up [N, R] of all weights is for W / size. hessian: H of x / smooth, [K, K]
    or its diagonal [K]; noise [K]: what quantization takes from x / smooth.
    """

    smooth: Tensor
    down: Tensor
    up: Tensor
    hessian: Tensor
    noise: Tensor

    @property
    def column_weights(self) -> Tensor:
        """What an error in a column of the weight costs, [K]."""
        diagonal = self.hessian if self.hessian.dim() == 1 else self.hessian.diagonal()
        return (diagonal + self.noise) * self.smooth.float().square()


class _Layer:
    """Weights [N_i, K] that share their input. The low rank is found for W / size, with its largest weight 1."""

    def __init__(self, weights: list[Tensor], fmt: SvdquantW4A4, statistics: Statistics, where: str) -> None:
        self.weights, self.fmt, self.statistics, self.where = weights, fmt, statistics, where
        largest = [rows.abs().amax() for w in weights for rows in self._rows(w)]
        self.size = torch.stack(largest).max().clamp_min_(torch.finfo(torch.float32).tiny)
        self.dtype = fmt.part_dtypes(weights[0].dtype)["scale"]

    def solved(self) -> Iterator[tuple[Tensor, Parts]]:
        """Each weight with all its parameters."""
        split, first = self._split(), 0
        for w in self.weights:
            last = first + w.shape[0]
            yield w, self._params(w, split.up[first:last], split)
            first = last

    def _rows(self, w: Tensor) -> Iterator[Tensor]:
        for start, stop in self.fmt.row_ranges(w.shape[0], w.shape[1]):
            yield self.fmt.prepared(w, start, stop, self.where)

    def _split(self) -> _Split:
        known, fmt, unsigned = self.statistics, self.fmt, self.fmt.act_unsigned
        moments = known.diagonal
        assert moments is not None
        samples = known.samples
        if samples is None or not samples.shape[0]:
            samples = simulated_input(moments, unsigned)
        smooth = calibrated_smoothing(self._sample(), moments, samples, fmt.rank, unsigned=unsigned, dtype=self.dtype)
        factor = smooth.float()
        noise, hessian = STEPS.input_noise(samples, factor, unsigned), self._smoothed_hessian(factor)
        scaled = torch.cat([rows * (factor / self.size) for w in self.weights for rows in self._rows(w)])
        up, down = low_rank(scaled, hessian, noise, fmt.rank)
        lengths = torch.linalg.vector_norm(down, dim=0).clamp_min_(torch.finfo(torch.float32).tiny)
        return _Split(smooth, (down / lengths / factor.unsqueeze(1)).to(self.dtype), up * lengths, hessian, noise)

    def _sample(self) -> Tensor:
        """Evenly spread rows of all weights."""
        k, total = self.weights[0].shape[1], sum(w.shape[0] for w in self.weights)
        count = min(total, max(_SAMPLE // k, 8 * self.fmt.rank))
        picked = []
        for w in self.weights:
            n = w.shape[0]
            some = max(1, count * n // total)
            picked.append(w[torch.arange(some, device=w.device) * n // some].float() / self.size)
        return torch.cat(picked)

    def _smoothed_hessian(self, factor: Tensor) -> Tensor:
        """H of x / s, shrunk toward its diagonal; only the diagonal where no more is known."""
        hessian, tokens = self.statistics.hessian, self.statistics.tokens
        assert hessian is not None
        if hessian.dim() == 1:
            scaled = hessian / factor.square()
            return scaled.clamp_min_(float(scaled.mean()) * 1e-6)
        amount = shrinkage(tokens, hessian.shape[0], broad=self.statistics.broad)
        return second_moments(hessian, amount, factor.reciprocal())

    def _params(self, w: Tensor, up: Tensor, split: _Split) -> Parts:
        """All parameters of one of the weights, with the scales searched. up: its rows of U."""
        fmt, shape, factor = self.fmt, (w.shape[0], w.shape[1]), split.smooth.float()
        down = split.down.float() * factor.unsqueeze(1)
        solve = least_squares(down, split.hessian)
        shared, weights = {"smooth_factor": split.smooth, "proj_down": split.down}, split.column_weights
        found: Parts = {}
        for (start, stop), rows in zip(fmt.row_ranges(*shape), self._rows(w), strict=True):
            scaled = rows * (factor / self.size)
            lost_to_lowest(scaled, torch.addmm(scaled, up[start:stop], down.t(), alpha=-1), scaled)
            params = {**shared, "proj_up": (scaled @ solve).mul_(self.size).to(self.dtype)}
            if not bool(params["proj_up"].isfinite().all()):
                kind = str(self.dtype).removeprefix("torch.")
                raise WeightError(
                    f"{self.where}: its low-rank factors exceed {kind}; repair the source or keep this layer"
                )
            params["scale"] = searched_scales(fmt, rows, params, weights)
            fmt.store_rows(found, params, shape, start)
        return found
