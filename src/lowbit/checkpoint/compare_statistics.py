"""What a comparison asks of statistics: the second moments that each layer is judged on, and nothing else of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lowbit.smoothing import rescaled
from lowbit.solvers import Statistics

from .layer_statistics import judging_moments


class StatisticsByLayer(Protocol):
    """What gives the statistics of a layer's input by the layer's name; a mapping does."""

    def get(self, layer: str, /) -> Statistics | None:
        """The statistics of a layer, or None."""
        ...


@runtime_checkable
class JudgingStatistics(Protocol):
    """Statistics that give what is needed here, and read nothing else."""

    def judging_moments(self, layer: str, /) -> Tensor | None:
        """The second moments of a layer's input, of the half held out where there is one; None for one without."""
        ...


def _moments(statistics: StatisticsByLayer, layer: str) -> Tensor | None:
    """The second moments that a layer is judged on; collections read nothing else for them."""
    if isinstance(statistics, JudgingStatistics):
        return statistics.judging_moments(layer)
    return judging_moments(statistics.get(layer))


@dataclass(frozen=True)
class RescaledInputs:
    """Statistics, some of whose inputs are multiplied by a scale [K]."""

    statistics: StatisticsByLayer
    scales: Mapping[str, Tensor]

    def get(self, layer: str, /) -> Statistics | None:
        """See `StatisticsByLayer`."""
        known, scale = self.statistics.get(layer), self.scales.get(layer)
        return known if known is None or scale is None else rescaled(known, scale)

    def judging_moments(self, layer: str, /) -> Tensor | None:
        """See `JudgingStatistics`."""
        known, scale = _moments(self.statistics, layer), self.scales.get(layer)
        return known if known is None or scale is None else rescaled(Statistics(hessian=known), scale).hessian


class Moments:
    """The caller's statistics, asked by one thread at a time; remembers which layers they had."""

    def __init__(self, source: StatisticsByLayer | None) -> None:
        self._source, self._lock = source, threading.Lock()
        self.found: set[str] = set()
        self.unknown: set[str] = set()

    def hessian(self, layer: str, full_name: str) -> Tensor | None:
        """The second moments on which a layer is judged, or None."""
        if self._source is None:
            return None
        with self._lock:
            h = _moments(self._source, full_name)
            if h is None and layer != full_name:
                h = _moments(self._source, layer)
            (self.unknown if h is None else self.found).add(full_name)
        return h
