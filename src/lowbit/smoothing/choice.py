"""The scale of a group: s = rms(x)^-rho for the input of its linears, as what takes it can hold it exactly.

The exponent is chosen on one half of the calibration's samples, and both errors are those on the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.numerics.block_diagonal import diagonal
from lowbit.numerics.smoothing import smoothing_factors
from lowbit.solvers.awq import WeightRows, best_exponent, scaled_error
from lowbit.solvers.base import Statistics
from lowbit.solvers.curvature import energy
from lowbit.solvers.input_scale import magnitudes_of

from .norms import ONE_PLUS

_NEAR = 1.5  # how far a scale that a norm can hold may be from the one wanted; farther, and the channel is left alone

_STEPS = 8  # of a scale of rows in an octave

Held = Callable[[Tensor], Tensor]
"""The nearest scale [K] float32 that the layer before can take such that it is found again in what is stored."""


@dataclass(frozen=True)
class Choice:
    """The exponent of a group, the scale [K] float32 of its input, and the relative errors of its outputs."""

    exponent: float
    scale: Tensor
    error_before: float
    error_after: float

    @property
    def gains(self) -> bool:
        """Whether less is lost with the scale than without."""
        return self.exponent > 0 and self.error_after < self.error_before


def choose(weights: Sequence[WeightRows], known: Statistics, held: Held, where: str) -> Choice:
    """The exponent with the least output error of the weights together, and what it is worth on samples held out.

    The errors are tr(E H E^T) / tr(W H W^T), with scales searched but codes not refined, and that of W / s in the dtype
    of W added; without samples held out they are those on the samples that it was chosen by.

    Raises `SolverError` without second moments, or for those of another layer.
    """
    device = weights[0].rows.device
    known = known.on(device)
    moments = known.column_weights(weights[0].rows.shape[1], where)
    if moments is None or known.hessian is None:
        raise SolverError(f"{where}: nothing is known of the input of the linears behind it; calibrate them")
    judge = known.held_out if known.held_out is not None and known.held_out_tokens else known.hessian

    def scale_of(exponent: float) -> Tensor:
        return input_factor(known, exponent, held)

    exponent = best_exponent(weights, known.hessian, moments, scale_of, where)
    scale, one = scale_of(exponent), torch.ones_like(moments)
    signal = sum(energy(w.rows.float(), judge) * w.share for w in weights) or 1.0
    before, after = (scaled_error(weights, s, judge, moments, where) for s in (one, scale))
    after += sum(energy(_rounded(w.rows, scale).sub_(w.rows.float()), judge) * w.share for w in weights)
    return Choice(exponent, scale, before / signal, after / signal)


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    """Rows [n, K] float32 as they count once they are stored as W / scale in their dtype."""
    return (rows.float() / scale).to(rows.dtype).float().mul_(scale)


def input_factor(known: Statistics, exponent: float, held: Held) -> Tensor:
    """rms(x)^-exponent [K] float32 with a geometric mean of one, as the layer before can hold it."""
    moments = known.diagonal
    assert moments is not None
    scale = smoothing_factors(moments.float().sqrt(), exponent)
    return held(scale) if exponent else scale


def held_by_norm(weight: Tensor, kind: str) -> Held:
    """Scales such that a norm's stored weight [K] holds its product with them without rounding.

    What multiplies is the weight, or one and the weight. A scale is then the quotient of two such numbers, and is found
    again from them. In float32 it is rounded to bfloat16 first, for the same reason. Where that is far from the scale
    wanted (a weight of zero, or products too small for float16), the channel keeps a scale of one.
    """
    gain = norm_gain(weight, kind)

    def held(scale: Tensor) -> Tensor:
        scale = scale.to(gain.device, torch.float32)
        if weight.dtype == torch.float32:
            found = scale.bfloat16().float()
        else:
            offset = 1.0 if kind == ONE_PLUS else 0.0
            found = ((gain * scale - offset).to(weight.dtype).float() + offset) / gain
        near = (found / scale > 1 / _NEAR) & (found / scale < _NEAR)  # also false for NaN
        return torch.where(near & (gain != 0), found, torch.ones_like(found))

    return held


def held_by_rows(scale: Tensor) -> Tensor:
    """Eighths of an octave, 2^(n / 8): coarse enough that quantized rows, against those they were made of, tell n."""
    return torch.exp2(scale.float().log2().mul_(_STEPS).round_().div_(_STEPS))


def norm_gain(weight: Tensor, kind: str) -> Tensor:
    """What a norm multiplies by, float32 [K]."""
    return weight.float() + 1 if kind == ONE_PLUS else weight.float()


def rescaled(statistics: Statistics, scale: Tensor) -> Statistics:
    """The statistics of an input multiplied by `scale` [K]; magnitudes are those of the kept samples, if any were."""

    def moments(h: Tensor | None) -> Tensor | None:
        if h is None:
            return None
        s = scale.to(h.device, torch.float32)
        return h * s.square() if h.dim() == 1 else h * s.unsqueeze(0) * s.unsqueeze(1)

    def channels(x: Tensor | None) -> Tensor | None:
        return None if x is None else x * scale.to(x.device, torch.float32)

    known, samples = statistics, channels(statistics.samples)
    counts = None if samples is None or known.magnitudes is None else magnitudes_of(samples.float())
    return replace(
        known, hessian=moments(known.hessian), held_out=moments(known.held_out), absmax=channels(known.absmax),
        mean=channels(known.mean), minimum=channels(known.minimum), maximum=channels(known.maximum),
        samples=samples, magnitudes=counts,
    )  # fmt: skip


def rescaled_outputs(statistics: Statistics, scale: Tensor) -> Statistics:
    """The statistics of a layer whose last rows are multiplied by `scale` [n]: their gradients are divided by it."""

    def moments(g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        s = torch.ones(diagonal(g).numel(), device=g.device)
        s[len(s) - scale.shape[0] :] = scale.to(g.device, torch.float32)
        s = s.view(g.shape[:-1])  # by block where only those are known
        return g / s.unsqueeze(-2) / s.unsqueeze(-1)

    known = statistics
    return replace(known, output_hessian=moments(known.output_hessian), output_held_out=moments(known.output_held_out))
