"""Solving layers that read the same input with one smooth_factor and one proj_down: query, key and value.

The start is made for all of them together (`svdquant_shared`, `shared_fit`); refinements and the bias go on from it for
each layer alone, and each is judged as ever: it must be no worse than rounding to nearest, which shares nothing, on the
samples held out. If one of them is worse however little of its pipeline is run, none shares, and each is solved alone.
Only `rtn` itself is not judged: the one that shares is what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format, check_finite
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4

from .base import Statistics
from .pipeline import AUTO, Pipeline, what_is_known
from .solve import Problem, Solution, chosen_pipeline, solve
from .svdquant import shared_fit, svdquant_shared

STARTS = ("svdquant", "scale_search", "rtn")
"""The starts that can be made for several layers together."""


@dataclass(frozen=True)
class Member:
    """One of the layers: its weight [N, K], the pipeline asked for, whether it has a bias; `where` names it."""

    w: Tensor
    name: str = AUTO
    has_bias: bool = False
    where: str = "weight"


@dataclass(frozen=True)
class SharedSolution:
    """What the layers became, and whether they share smooth_factor and proj_down."""

    solutions: tuple[Solution, ...]
    shared: bool


def solve_shared(
    members: Sequence[Member],
    fmt: Format,
    statistics: Statistics | None = None,
    *,
    where: str = "weights",
    seed: int | None = None,
) -> SharedSolution:
    """Quantize weights [N_i, K] with the same input. `where` names all of them in errors; others are as in `solve`.

    Of the statistics only what is known of the input is used: the gradient at the output is that of one layer.

    Raises `SolverError` also for a format without a low-rank branch, for weights that differ in K or dtype, and for
    pipelines that start or refine differently.
    """
    statistics = None if statistics is None else statistics.without_outputs
    chosen = _pipelines(members, fmt, statistics, where, seed)
    first = chosen[0][0]
    weights, notes = [one.w for one in members], [note for _, note in chosen]
    if statistics is None or not what_is_known(statistics) or not all(w.numel() for w in weights):
        parts = shared_fit(weights, fmt, None, where=where, seed=seed, search=first.start != "rtn")
        made = [Solution(own, first.start, note=note) for own, note in zip(parts, notes, strict=True)]
        return SharedSolution(tuple(made), shared=True)
    known = statistics.on(weights[0].device)
    known.check(weights[0].shape[0], weights[0].shape[1], where)
    problems = [
        Problem(one.w, fmt, pipeline, known, one.where, seed)
        for one, (pipeline, _) in zip(members, chosen, strict=True)
    ]
    tried, lost = _together(problems, where)
    if lost:
        return SharedSolution(tuple(_alone(members, fmt, statistics, seed, lost)), shared=False)
    told = ["; ".join(filter(None, (note, found.note))) for note, found in zip(notes, tried, strict=True)]
    made = [replace(found, note=note) for found, note in zip(tried, told, strict=True)]
    return SharedSolution(tuple(made), shared=True)


def _pipelines(
    members: Sequence[Member], fmt: Format, statistics: Statistics | None, where: str, seed: int | None
) -> list[tuple[Pipeline, str]]:
    """The pipeline of each layer and its note, once all of them can share."""
    if not isinstance(fmt, SvdquantW4A4) or fmt.plain != fmt:
        raise SolverError(f"{where}: {fmt} has no low-rank branch that layers could share; solve them one by one")
    chosen = []
    for one in members:
        fmt.check_weight(one.w, one.where)
        check_finite(one.w, one.where)
        chosen.append(chosen_pipeline(one.w, fmt, one.name, statistics, one.where, seed, has_bias=one.has_bias))
    first = chosen[0][0]
    if any((pipeline.start, pipeline.steps) != (first.start, first.steps) for pipeline, _ in chosen):
        raise SolverError(f"{where}: layers that share their low rank need one pipeline; give them the same solver")
    if first.start not in STARTS:
        raise SolverError(f"{where}: {first.start} cannot start several layers together; use {', '.join(STARTS)}")
    return chosen


def _together(problems: Sequence[Problem], where: str) -> tuple[list[Solution], str]:
    """Each layer solved from the start that they share, or why that cannot be."""
    first = problems[0]
    try:
        starts = _starts(problems, where)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # as in `Problem`
        return [], f"{first.pipeline.start} cannot use second moments that are no positive definite matrix"
    found = []
    for problem, start in zip(problems, starts, strict=True):
        solution = replace(problem, start=start).best()
        if solution.solver == "rtn" != problem.pipeline.start:
            return [], f"{problem.where} was worse than rounding to nearest with the factors that it shared"
        found.append(solution)
    return found, ""


def _starts(problems: Sequence[Problem], where: str) -> list[Parts]:
    first = problems[0]
    weights, fmt, start = [problem.w for problem in problems], first.fmt, first.pipeline.start
    if start == "svdquant":
        return svdquant_shared(weights, fmt, first.for_start, where=where, seed=first.seed)
    columns = first.for_start.column_weights(weights[0].shape[1], where) if start == "scale_search" else None
    return shared_fit(weights, fmt, columns, where=where, seed=first.seed, search=start == "scale_search")


def _alone(
    members: Sequence[Member], fmt: Format, statistics: Statistics, seed: int | None, lost: str
) -> list[Solution]:
    """Each layer solved for itself, with the reason in its note."""
    made = []
    for i, one in enumerate(members):
        own = None if seed is None else seed + i
        found = solve(one.w, fmt, one.name, statistics, where=one.where, seed=own, has_bias=one.has_bias)
        made.append(replace(found, note="; ".join(filter(None, (f"shares nothing: {lost}", found.note)))))
    return made
