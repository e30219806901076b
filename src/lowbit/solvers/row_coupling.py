"""Rows that make up for each other: rounding against the error of the model's output instead of the layer's.

With G = E[g g^T], the second moment of the gradient at the layer's outputs, an error E of the weight costs
tr(G E H E^T) at the output of the model. With G = L D L^T (L unit lower triangular) that is the sum over rows j of
D_j |E_j + sum over i > j of L_ij E_i|^2, measured by H: what gptq does along the columns holds along the rows too. From
the last row to the first, each is solved for its weight plus L_ij times the errors of the rows done (LDLQ on both
sides: YAQA, arXiv 2505.22988). `ROWS` rows are solved at once, as if they had no part in each other.

Of a large layer only blocks of G along its diagonal may be known. Rows of different blocks have no part in each other,
so some of every block are solved at once.

What it buys on MiniLM, calibrated on the built-in text, as a share of the error that H alone leaves, the mean over text
of three kinds: int8 weights 0.84, fp8 0.89, 4 bits 0.87 to 0.89. On a sixth of that text, going over the rows again
with all others as they are bought at most 1 % of tr(G E H E^T); 64 rows at once cost 1 to 3 % of the error, and rows in
the order of the file 3 to 6 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, gather_rows
from lowbit.numerics.block_diagonal import blocks, count_of, diagonal

from .curvature import arranged, unit_lower
from .refinement import Draft, Refinement, Unrefined, refine

ROWS = 32
SHRUNK = 0.5  # toward the diagonal of G: 0.2 to 0.5 were alike, and gradients are noisier than inputs
_SHARE = 16  # of a block's rows at least so many times those that are solved at once
_MOST_ROWS = 512  # of all blocks together: more take memory, and are no faster
_LEAST = 1e-3  # of the mean of the diagonal: the least that a row counts


def refine_coupled(given: Unrefined, steps: Sequence[Refinement], outputs: Tensor) -> Parts:
    """`refine` against tr(G E H E^T). outputs: G [N, N] or its blocks, shrunk here toward its diagonal.

    Rows are taken by rising weight, so that those that count most are free. Where blocks of rows have parts in common,
    they keep their places. Raises `SolverError`.
    """
    rules, outputs = given.fmt.rules, shrunk_outputs(outputs.to(given.w.device))
    order = row_order(given.fmt, outputs)
    coupling = RowCoupling(outputs, order, given.where)
    if order is None:
        return refine(given, steps, coupling)
    taken = coupling.taken(order)
    ordered = replace(given, w=given.w[taken], parts=gather_rows(rules, given.parts, taken))
    return gather_rows(rules, refine(ordered, steps, coupling), taken.argsort())


def row_order(fmt: Format, outputs: Tensor) -> Tensor | None:
    """In which order the rows of each block of G are taken, int64 [B, N/B], from 0; None for that of the file."""
    if any(rule.rows_per_entry != 1 for rule in fmt.rules):
        return None
    return diagonal(outputs).view(count_of(outputs), -1).argsort(1)


class GradientsError(SolverError):
    """G has no triangular factor: it is not a second moment."""


class RowCoupling:
    """L [b, b] of each block of a shrunk G, and the errors of its rows that are done [K, b], in the units of the grid.

    `order`: that of the rows of each block, see `row_order`. Raises `GradientsError`, naming `where`, when G is no
    second moment.
    """

    def __init__(self, outputs: Tensor, order: Tensor | None, where: str) -> None:
        self._lower = []
        for index, (_, block) in enumerate(blocks(outputs)):
            lower = unit_lower(block if order is None else arranged(block, order[index]))
            if lower is None:
                raise GradientsError(
                    f"{where}: the second moments of the gradient are no positive definite matrix; calibrate it again"
                )
            self._lower.append(lower)
        count = len(self._lower)
        self._size = self._lower[0].shape[0]
        most = ROWS if count == 1 else min(ROWS, self._size // _SHARE, _MOST_ROWS // count)
        self._each = max(most, 1)  # rows of a block that are solved at once
        self._mixed = order is not None and count > 1
        self._errors: list[Tensor] = []

    @property
    def multiple(self) -> int:
        """Of how many rows the pieces are in which the rows can be given."""
        return self._each * len(self._lower) if self._mixed else 1

    def taken(self, order: Tensor) -> Tensor:
        """The rows of the weight as they are to be given, int64 [N]: of each block the next few, the last ones last."""
        rows = order + torch.arange(len(order), device=order.device).unsqueeze(1) * self._size
        return torch.cat([some.reshape(-1) for some in rows.split(self._each, 1)])

    def refine(self, draft: Draft, first: int, steps: Sequence[Refinement]) -> None:
        """Refine the rows of a draft, of which the first is row `first` of the weight; all behind them are done."""
        columns, n = draft.values.shape
        if not self._errors:
            self._errors = [lower.new_zeros((columns, self._size)) for lower in self._lower]
        size = self.multiple if self._mixed else draft.rows_at_once(ROWS)
        for start in range((n - 1) // size * size, -1, -size):
            stop = min(start + size, n)
            here = list(self._parts(first + start, first + stop))
            piece = draft.narrow(start, stop)
            wanted = piece.grid.target
            piece.grid.target = wanted.new_empty(wanted.shape)
            for block, own, rows in here:
                done = self._errors[block][:, own.start :], self._lower[block][own.start :, own]
                torch.addmm(wanted[:, rows], *done, out=piece.grid.target[:, rows])
            for step in steps:
                step(piece)
            draft.take(piece, start, stop)
            for block, own, rows in here:
                torch.sub(wanted[:, rows], piece.values[:, rows], out=self._errors[block][:, own])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """Of rows `start` to `stop` as they are given: each block, which of its own rows these are, and which of all.

        A block's own rows that are not done yet have no errors so far, so they may be among those behind.
        """
        if self._mixed:
            count, first = len(self._lower), start // len(self._lower)
            each = (stop - start) // count
            for block in range(count):
                yield block, slice(first, first + each), slice(block * each, (block + 1) * each)
            return
        for block in range(start // self._size, (stop - 1) // self._size + 1):
            begin = block * self._size
            low, high = max(start, begin), min(stop, begin + self._size)
            yield block, slice(low - begin, high - begin), slice(low - start, high - start)


def shrunk_outputs(outputs: Tensor) -> Tensor:
    """G [N, N], or its blocks, shrunk toward its diagonal, with no row that does not count. A new tensor."""
    shrunk, weights = outputs * (1 - SHRUNK), diagonal(outputs)
    diagonal(shrunk).copy_(weights.clamp(min=max(float(weights.mean()) * _LEAST, 2.0**-126)))
    return shrunk
