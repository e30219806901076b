"""Whether statistics are of the very checkpoint they are used for, or of it before or after scales were folded in.

Names and shapes are the same in all of them; what the norms multiply by is not. Before that, every row that an RMS norm
gives has a mean square of one, or less by its epsilon, and never more: rows of other norms show themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import PlanError, StatisticsError
from lowbit.smoothing import ONE_PLUS, WEIGHT, find_groups, norm_gain
from lowbit.solvers import Statistics

from .dialects.base import join_key
from .fold_data import ROWS, Fold
from .fold_groups import norm_kind
from .folding import folds_of, known_of, layer_name
from .layer_statistics import LayerStatistics
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Component, Source

_MEAN_SQUARE = (0.5, 1.05)  # of what a norm gives: less than one only by its epsilon, more by rounding
_DOUBT = 0.05  # by how much, as a logarithm, the other kind of norm may fit better
_MOST = 1.015  # of a mean square: rounding to bfloat16, twice, adds up to 0.008 to that of a row
_LOOKED_AT = 8  # norms of a model, for the statistics of each are read


@dataclass(frozen=True)
class _Norm:
    """A norm, what it may multiply by, and the linears that read what it gives."""

    name: str
    kinds: tuple[str, ...]
    linears: tuple[str, ...]


def check_norms(source: Source, statistics: LayerStatistics, place: str = "") -> None:
    """Raise `StatisticsError` for statistics, from `place`, that do not fit the norms of a checkpoint.

    They are those of the model before scales were folded into it, or after, or of another version of it. Models whose
    norms are not known are not looked at. By default `place` is what the statistics say of themselves.
    """
    place = place or getattr(statistics, "place", "the statistics")
    for component in source.components:
        held = look_for_layers(source, component, strict=False)
        marked = [fold for fold in folds_of(source, component) if fold.kind != ROWS]
        norms = [_Norm(fold.before, (fold.kind,), fold.linears) for fold in marked] or list(_norms(held))
        worst = max(((_excess(held, norm, statistics), norm.name) for norm in _some(norms)), default=(0.0, ""))
        if worst[0] <= _MOST:
            continue
        fact = (
            f"what {worst[1]!r} gives has, over its weight, a mean square of up to {worst[0]:.3f}, and one is the most"
        )
        if marked:
            raise StatisticsError(
                f"{place}: are of the model before scales were folded into {source.place}, as its header says they "
                f"were: by the statistics {fact}; calibrate this checkpoint, or convert the one before"
            )
        raise StatisticsError(
            f"{place}: are not of {source.place} as it is: by the statistics {fact}. They are of another version of "
            "the model, such as one with scales folded in; calibrate this one"
        )


def check_folds_fit(source: Source, component: Component, folds: Iterable[Fold], statistics: LayerStatistics) -> None:
    """Raise `PlanError` for a fold into a norm that, by the statistics, does not multiply as the fold's kind says."""
    for fold in folds:
        if not fold.active or fold.kind == ROWS:
            continue
        known = known_of(statistics, (layer_name(component, name) for name in fold.linears))
        weight = source.read(component, fold.keys[0])
        if known is not None and (why := contradiction(known, weight, fold.kind)):
            raise PlanError(
                f"{source.place}: the fold {fold.before!r}: {why}; plan anew with these statistics, or set its "
                "exponent to 0"
            )


def contradiction(known: Statistics, weight: Tensor, kind: str) -> str:
    """Why what is known of a norm's output says that it does not multiply by its weight [K] as `kind` has it, or ""."""
    if known.diagonal is None:
        return ""
    mine = mean_square(known, norm_gain(weight, kind))
    other = mean_square(known, norm_gain(weight, WEIGHT if kind == ONE_PLUS else ONE_PLUS))
    low, high = _MEAN_SQUARE
    if low < mine < high and abs(math.log(mine)) < abs(math.log(max(other, 1e-30))) + _DOUBT:
        return ""
    return f"by the statistics it does not multiply by {'1 + its' if kind == ONE_PLUS else 'its'} weight"


def mean_square(known: Statistics, gain: Tensor) -> float:
    """That of a norm's output before it is multiplied by `gain` [K]; without the channels where that is zero."""
    assert known.diagonal is not None
    live = gain != 0
    return float((known.diagonal[live] / gain[live].square()).sum() / gain.numel())


def _norms(held: QuantizedComponent) -> Iterator[_Norm]:
    """The norms of a model of a known type, or of a single file by names."""
    why, kind = norm_kind(held)
    if why:
        return
    kinds = (kind,) if "config.json" in held.configs else (WEIGHT, ONE_PLUS)
    for group in find_groups({key: spec.shape for key, spec in held.specs.items()}):
        if group.norm and not group.why_not:
            yield _Norm(group.before, kinds, group.linears)


def _some(norms: list[_Norm]) -> list[_Norm]:
    """A few of them at even distances."""
    count = min(len(norms), _LOOKED_AT)
    return [norms[index * len(norms) // count] for index in range(count)]


def _excess(held: QuantizedComponent, norm: _Norm, statistics: LayerStatistics) -> float:
    """How large the mean square of what a norm gives is, by the kind that fits better; 0 where nothing is known."""
    key = join_key(norm.name, "weight")
    if key not in held.specs or join_key(norm.name, "bias") in held.specs:
        return 0.0
    known = known_of(statistics, (layer_name(held.component, name) for name in norm.linears))
    if known is None or known.diagonal is None or known.diagonal.shape != held.specs[key].shape:
        return 0.0
    weight = held.read(key)
    gains = [norm_gain(weight, kind) for kind in norm.kinds]
    return _largest(known, min(gains, key=lambda gain: abs(math.log(max(mean_square(known, gain), 1e-30)))))


def _largest(known: Statistics, gain: Tensor) -> float:
    """The largest mean square of a kept row of a norm's output before it is multiplied by `gain` [K]."""
    if known.samples is None or not len(known.samples):
        return mean_square(known, gain)
    rows = known.samples.float() / torch.where(gain == 0, torch.inf, gain)
    return float(rows.square().mean(1).max())
