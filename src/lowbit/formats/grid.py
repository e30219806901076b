"""The grid of a format: what each weight may become once the scales are fixed.

    value = zero + step * level        level: one of a fixed set, the same for all weights of the format

Solvers that choose codes one column after the other work on this and know nothing else of a format. Tensors are
transposed, [K, n] for n rows of a weight, so that one column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.numerics.levels import Levels

Snap = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


@runtime_checkable
class RowSnap(Protocol):
    """A `Snap` that is another one for each row."""

    def __call__(self, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Snap`."""
        ...

    def narrow(self, start: int, stop: int) -> Snap:
        """That of some of the rows."""
        ...


@runtime_checkable
class UnitSnap(RowSnap, Protocol):
    """One that is another one for each unit, too: called itself, it is given the steps of all of them."""

    def at(self, units: slice) -> Snap:
        """That of some of the units."""
        ...


def keep_as_they_are(step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The `Snap` of steps that are stored in float32."""
    return step, zero


@dataclass
class Grid:
    """The grid of some rows, n of them, in the units in which their codes count.

    target   [K, n]            what the codes are to express
    step     [ceil(K/c), n]    what one level is worth; 0 where a unit holds nothing but zeros
    zero     [ceil(K/c), n]    what level 0 stands for; None for 0
    factor   [K]               an error of 1 in `target` is an error of this in the weight; None for 1

    `columns` (c) share a step along K, and `rows` of them along N. `snap` gives the nearest steps and zeros that the
    format can store: call `snapped`, which says of which units they are.
    """

    target: Tensor
    step: Tensor
    levels: Levels
    columns: int
    rows: int = 1
    zero: Tensor | None = None
    factor: Tensor | None = None
    snap: Snap = keep_as_they_are

    def __post_init__(self) -> None:
        self.step = self.step.contiguous()
        self.zero = None if self.zero is None else self.zero.contiguous()
        self._divisor = self._divisors()
        # Views of one row each: solvers ask for every column in turn, and taking a row costs as much as a sum over it.
        self._steps, self._divided = self.step.unbind(0), self._divisor.unbind(0)
        self._zeros = None if self.zero is None else self.zero.unbind(0)

    @property
    def divisor(self) -> Tensor:
        """What is divided by to find levels [ceil(K/c), n]: the step, infinity where that is 0."""
        return self._divisor

    def _divisors(self) -> Tensor:
        return self.step.masked_fill(self.step == 0, torch.inf)

    def nearest(self, x: Tensor, column: int) -> Tensor:
        """The grid value nearest to x [n], for one column."""
        unit = column // self.columns
        if self._zeros is None:
            return self.levels.round_(x / self._divided[unit]).mul_(self._steps[unit])
        zero = self._zeros[unit]
        return self.levels.round_((x - zero).div_(self._divided[unit])).mul_(self._steps[unit]).add_(zero)

    def units(self, first: int, last: int) -> slice:
        """The units of the columns from `first` to `last`, which must be whole ones or lie within one."""
        return slice(first // self.columns, -(-last // self.columns))

    def spread(self, by_unit: Tensor, first: int, last: int) -> Tensor:
        """Rows of `by_unit` [U, n], one a column from `first` to `last`."""
        cut = by_unit[self.units(first, last)]
        if cut.shape[0] == 1:
            return cut
        return cut.repeat_interleave(self.columns, dim=0)[: last - first]

    def levels_of(self, values: Tensor, first: int, last: int) -> Tensor:
        """The levels of grid values [last - first, n] of some columns, float32."""
        shifted = values if self.zero is None else values - self.spread(self.zero, first, last)
        return self.levels.round_(shifted / self.spread(self._divisor, first, last))

    def snapped(self, units: slice, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The nearest steps and zeros that the format can store for some units, of float32 ones [units, n]."""
        snap = self.snap.at(units) if isinstance(self.snap, UnitSnap) else self.snap
        return snap(step, zero)

    def narrow(self, start: int, stop: int) -> Grid:
        """The grid of some of the rows, copied."""
        target, step = self.target[:, start:stop].contiguous(), self.step[:, start:stop]
        zero = None if self.zero is None else self.zero[:, start:stop]
        snap = self.snap.narrow(start, stop) if isinstance(self.snap, RowSnap) else self.snap
        return replace(self, target=target, step=step, zero=zero, snap=snap)

    def put_back(self, piece: Grid, start: int, stop: int) -> None:
        """Take the steps and zeros that some of the rows have now."""
        self.step[:, start:stop] = piece.step
        self._divisor[:, start:stop] = piece.divisor
        if self.zero is not None and piece.zero is not None:
            self.zero[:, start:stop] = piece.zero

    def replace_steps(self, units: slice, step: Tensor, zero: Tensor | None) -> None:
        """Take other steps and zeros for some units; they must be ones that can be stored."""
        self.step[units] = step
        self._divisor[units] = step.masked_fill(step == 0, torch.inf)
        if self.zero is not None and zero is not None:
            self.zero[units] = zero
