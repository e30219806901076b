"""The least errors that scale candidates reach, and those of a sweep over all scales, to hold one against the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit.formats import Format, Parts


def unit_errors(fmt: Format, w: Tensor, params: Parts) -> Tensor:
    """Squared errors of every unit of prepared rows, summed in float64."""
    return fmt.unit_errors((fmt.project(w, params) - w).double().square())


def searched(fmt: Format, w: Tensor, rows: int = 1 << 30) -> tuple[Tensor, int]:
    """The least error of every unit over the format's own candidates, and how many of them had to be evaluated at most.

    `rows` are searched at once. A candidate is left out where its bound says that no unit of them can gain, so that
    fewer rows show more of the bounds.
    """
    found, most = [], 0
    shared = fmt.fit_shared(w)
    for piece in fmt.prepare(w).split(rows):
        params = fmt.fit(piece, shared)
        best, evaluated = unit_errors(fmt, piece, params), 0
        for candidate in fmt.candidates(piece, params):
            if candidate.bound is not None and bool((candidate.bound >= best).all()):
                continue
            evaluated += 1
            best = torch.minimum(best, unit_errors(fmt, piece, candidate.params))
        found.append(best)
        most = max(most, evaluated)
    return torch.cat(found), most


def swept(fmt: Format, w: Tensor, scales: Iterable[Tensor]) -> Tensor:
    """The least error of every unit over `scales`, each given to all units at once, and over the fitted ones."""
    shared, w = fmt.fit_shared(w), fmt.prepare(w)
    params = fmt.fit(w, shared)
    best = unit_errors(fmt, w, params)
    for scale in scales:
        best = torch.minimum(best, unit_errors(fmt, w, {**params, "scale": scale.expand_as(params["scale"])}))
    return best
