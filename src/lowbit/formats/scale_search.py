"""The best scales that a format proposes, for each unit on its own.

A unit is the tile of weights that shares one scale. Codes at a given scale are rounded to nearest, so the error of a
unit depends on its own scale alone, and an exhaustive search over `Format.candidates` finds the best of them. The
search starts at the format's own scale and moves only where the squared error becomes smaller: no unit is ever worse
than by rounding to nearest at that. Formats whose units share a part of their scales search by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.parts import Part, Parts

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def best_params(w: Tensor, fmt: Format, weights: Tensor | None, where: str) -> Parts:
    """The parameters of a weight [N, K] with the least squared error in each unit; `weights` [K] of columns or None."""
    shape = (w.shape[0], w.shape[1])
    tall = fmt.unit(shape)[0]
    shared = fmt.fit_shared(w)
    if tall > fmt.row_multiple and tall != shape[0]:
        raise SolverError(f"{where}: {fmt} shares scales among {tall} rows but cuts rows by {fmt.row_multiple}")
    if tall > fmt.row_multiple:
        return _search_whole(w, fmt, shared, weights, where)
    found: Parts = {}
    for start, stop in fmt.row_ranges(*shape):
        rows = fmt.prepared(w, start, stop, where)
        params = fmt.fit_stored(rows, shared, w.dtype, where)
        fmt.store_rows(found, search_rows(rows, fmt, params, weights), shape, start)
    return found


def search_rows(rows: Tensor, fmt: Format, params: Parts, weights: Tensor | None) -> Parts:
    """The best parameters of some prepared rows (float32 [n, K]) that hold whole units."""
    own = fmt.searched(rows, None if weights is None else weights.to(rows.device))
    if own is not None:
        return own
    best = _errors(rows, fmt, params, weights)
    # A bound on plain squares holds for weighted ones times this.
    lightest = 1.0 if weights is None else float(weights.min())
    chosen = dict(params)
    for candidate in fmt.candidates(rows, params):
        if candidate.bound is not None and not bool((candidate.bound * lightest < best).any()):
            continue
        errors = _errors(rows, fmt, candidate.params, weights)
        better = errors < best
        if bool(better.any()):
            _take(fmt, chosen, candidate.params, better)
            best = torch.minimum(best, errors)
    return chosen


def _search_whole(w: Tensor, fmt: Format, shared: Parts, weights: Tensor | None, where: str) -> Parts:
    """The best parameters when the whole weight is one unit: the errors of each candidate are summed over all rows."""
    options: list[Parts] = []
    totals = torch.zeros(0, dtype=torch.float64)
    for start, stop in fmt.row_ranges(w.shape[0], w.shape[1]):
        rows = fmt.prepared(w, start, stop, where)
        params = fmt.fit_stored(rows, shared, w.dtype, where)
        options = [params, *(candidate.params for candidate in fmt.candidates(rows, params))]
        sums = torch.stack([_errors(rows, fmt, option, weights).sum(dtype=torch.float64).cpu() for option in options])
        totals = sums if not totals.numel() else totals + sums
    return options[int(totals.argmin())]  # the first of equals: the format's own choice


def _errors(rows: Tensor, fmt: Format, params: Parts, weights: Tensor | None) -> Tensor:
    """The squared error of each unit: [units along N, units along K]."""
    error = fmt.project(rows, params).sub_(rows)
    if weights is None:
        return fmt.unit_errors(error.square_())
    return fmt.unit_errors(
        fmt.restore(error).square_().mul_(weights.to(rows.device))
    )  # the weights are of true columns


def _take(fmt: Format, chosen: Parts, other: Parts, better: Tensor) -> None:
    """Replace the parameters of the units where `better` [units along N, units along K] holds, in new tensors."""
    for rule in fmt.param_rules:
        old, new = chosen[rule.name], other[rule.name]
        if new is not old:
            chosen[rule.name] = _mix(old, new, _along(rule, better, old))


def _along(rule: Part, better: Tensor, tensor: Tensor) -> Tensor:
    """`better` in the shape of a parameter, which may have its units along N last (scale [G, N])."""
    mask = better.t() if rule.row_axis == 1 else better
    if mask.numel() != tensor.numel():
        raise SolverError(
            f"{rule.name} of shape {list(tensor.shape)} has no value for each of {list(mask.shape)} units; "
            "a format's candidates may only change parameters that belong to one unit"
        )
    return mask.reshape(tensor.shape)


def _mix(old: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    """`new` where the mask holds, else `old`, by bits: exact for every dtype, float8 too, and faster than a select."""
    kind = _INTEGERS[old.dtype.itemsize]
    bits = old.contiguous().view(kind)
    pick = mask.to(kind).neg_()  # 0 or all ones
    return (bits ^ ((bits ^ new.contiguous().view(kind)) & pick)).view(old.dtype)
