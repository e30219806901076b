"""What refinements work on: the codes and scales of some rows, to be improved in place against H."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.numerics.groups import round_up, row_chunks

from .curvature import Curvature, prepared_hessian, second_moments

DRAFT_ELEMENTS = 1 << 23  # of a piece of rows: 32 MiB a tensor, of which a draft holds about five


class Draft:
    """n rows on their way: the grid, the values chosen on it [K, n], and H in the grid's units.

    `fixed_scales`: they are a part of the rows that share their scales, so only codes may change.
    """

    def __init__(self, grid: Grid, values: Tensor, curvature: Curvature, *, fixed_scales: bool = False) -> None:
        self.grid, self.values, self.curvature, self.fixed_scales = grid, values, curvature, fixed_scales
        self._gradient: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """H (target - values) [K, n]: half the slope of the error. Whoever changes the values keeps it up to date."""
        if self._gradient is None:
            self._gradient = self.curvature.hessian @ (self.grid.target - self.values)
        return self._gradient

    def forget_gradient(self) -> None:
        """Say that the values changed."""
        self._gradient = None

    def error(self) -> float:
        """tr(E H E^T), a few columns at a time: their difference stays in the cache."""
        target, gradient = self.grid.target, self.gradient
        total = torch.zeros((), dtype=torch.float64, device=target.device)
        for start, stop in row_chunks(*target.shape):
            missed = target[start:stop] - self.values[start:stop]
            total += missed.mul_(gradient[start:stop]).sum(dtype=torch.float64)
        return float(total)

    def rows_at_once(self, size: int) -> int:
        """About `size` rows that have their scales to themselves; `size` where too many share one."""
        return round_up(size, self.grid.rows) if self.grid.rows <= size else size

    def narrow(self, start: int, stop: int) -> Draft:
        """A draft of some of the rows, copied."""
        fixed = self.fixed_scales or self.grid.rows > stop - start or bool(start % self.grid.rows)
        return Draft(
            self.grid.narrow(start, stop), self.values[:, start:stop].contiguous(), self.curvature, fixed_scales=fixed
        )

    def take(self, piece: Draft, start: int, stop: int) -> None:
        """Put back what became of some of the rows."""
        self.values[:, start:stop] = piece.values
        if not piece.fixed_scales:
            self.grid.put_back(piece.grid, start, stop)
        self.forget_gradient()


class Refinement(Protocol):
    """Improves a draft in place; registered under a name."""

    def __call__(self, draft: Draft) -> None:
        """Change `draft.values`, or the steps of `draft.grid` with them."""
        ...


class Coupling(Protocol):
    """What makes rows make up for the errors of others; see `row_coupling`."""

    @property
    def multiple(self) -> int:
        """Of how many rows a draft is, unless it holds the last ones."""
        ...

    def refine(self, draft: Draft, first: int, steps: Sequence[Refinement]) -> None:
        """Refine the rows of a draft, of which the first is row `first` of the weight; all behind them are done."""
        ...


_REGISTRY: dict[str, Refinement] = {}
R = TypeVar("R", bound=Refinement)


def register_refinement(name: str) -> Callable[[R], R]:
    """Function decorator: make a refinement known by its name. A second one of that name is refused."""

    def add(function: R) -> R:
        if name in _REGISTRY:
            raise SolverError(f"a refinement named {name!r} is registered already")
        _REGISTRY[name] = function
        return function

    return add


def refinements() -> dict[str, Refinement]:
    """Every registered refinement by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


@dataclass(frozen=True)
class Unrefined:
    """What is to be refined: a weight [N, K], its parts so far, and H [K, K] of its input.

    H is to be shrunk by `amount` toward its diagonal. `where` names the layer in errors.
    """

    w: Tensor
    fmt: Format
    parts: Parts
    hessian: Tensor
    amount: float
    where: str = "weight"


def refine(given: Unrefined, steps: Sequence[Refinement], coupling: Coupling | None = None) -> Parts:
    """The parts of a weight after some refinements, a bounded piece of rows at a time.

    With a `coupling` the last piece comes first. Raises `SolverError`.
    """
    fmt, where = given.fmt, given.where
    if fmt.pre_quant_scale:
        return _refine_scaled(given, steps, coupling)
    out: Parts = {}
    curvature: Curvature | None = None
    hessian = prepared_hessian(given.hessian.to(given.w.device), fmt)
    shape = (given.w.shape[0], given.w.shape[1])
    multiple = max(fmt.row_multiple, fmt.unit(shape)[0])
    if coupling is not None:
        multiple = math.lcm(multiple, coupling.multiple)
    pieces = list(row_chunks(*shape, multiple, DRAFT_ELEMENTS))
    for start, stop in pieces if coupling is None else reversed(pieces):
        rows = fmt.prepared(given.w, start, stop, where)
        params = narrow_rows(fmt.param_rules, given.parts, start, stop)
        grid = fmt.grid(rows, params)
        if curvature is None:
            curvature = Curvature(second_moments(hessian, given.amount, grid.factor), where)
        draft = Draft(grid, _values(fmt, given.parts, start, stop, grid), curvature)
        if coupling is None:
            for step in steps:
                step(draft)
        else:
            coupling.refine(draft, start, steps)
        params = fmt.with_steps(params, grid)
        codes = fmt.encode(fmt.from_grid(draft.values, params), params)
        fmt.store_rows(out, {**params, "qdata": fmt.pack(codes)}, shape, start)
    return out


def _refine_scaled(given: Unrefined, steps: Sequence[Refinement], coupling: Coupling | None) -> Parts:
    """`refine` where the input is multiplied by a stored vector first: of w / scale, for the input x * scale."""
    stored = given.parts["pre_quant_scale"]
    scale = stored.float()
    plain = replace(
        given,
        w=given.w.float() / scale,
        fmt=given.fmt.plain,
        parts={name: value for name, value in given.parts.items() if name != "pre_quant_scale"},
        hessian=given.hessian.to(given.w.device) * scale.unsqueeze(0) * scale.unsqueeze(1),
    )
    return {**refine(plain, steps, coupling), "pre_quant_scale": stored}


def _values(fmt: Format, parts: Parts, start: int, stop: int, grid: Grid) -> Tensor:
    """The grid values [K, n] that the codes of some rows stand for."""
    k = grid.target.shape[0]
    cut = narrow_rows(fmt.plain.rules, parts, start, stop)
    rows = fmt.decode(fmt.unpack(cut["qdata"], k), cut)[:, :k].contiguous()
    return fmt.grid(rows, narrow_rows(fmt.param_rules, parts, start, stop)).target
