"""A quantized weight plus a change: codes that move by whole levels, at the scales that the weight has.

Most of a weight stays as it is, bit for bit. A change much smaller than a level (a LoRA's is one) is expressed by a few
codes that move, as `rounding_cells` decides. Where the sum reaches beyond the grid of a unit (the weights that share a
scale), that unit's step is also tried just as large as it must be, and is taken if the squared error gets smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats.base import Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.numerics.groups import row_chunks

from .rounding_cells import ROUNDINGS, Moved, dither, extremes, has_cells, moved, rounding_noise

_ELEMENTS = 1 << 20  # of a piece of rows
_BEYOND = 1e-3  # levels beyond the last one that count as clipped: less is rounding of float32
_ENOUGH = 0.9  # of the change: with less, a format whose grid is not a set of levels is fitted anew


@dataclass(frozen=True)
class Added:
    """The parts of weight plus change, and what became of the change.

    `recovered`: of the change, <new - old, change> / <change, change>; 1 is all of it. `error`: squared, of the new
    weight, relative to the change's square. `refitted`: units that got another scale; `clipped`: those that would have
    needed one, of `units`.
    """

    parts: Parts
    recovered: float
    error: float
    refitted: int
    clipped: int
    units: int


@dataclass
class _Sums:
    """Scalar products over the pieces, in float64."""

    change: float = 0.0
    gained: float = 0.0
    error: float = 0.0
    refitted: int = 0
    clipped: int = 0
    units: int = 0

    def result(self, parts: Parts) -> Added:
        whole = self.change or 1.0
        recovered = self.gained / whole if self.change else 1.0
        return Added(parts, recovered, self.error / whole, self.refitted, self.clipped, self.units)


def refuse_addition(fmt: Format, rounding: str, where: str) -> None:
    """Raise `FormatError` unless changes can be added to weights of this format with this rounding."""
    if rounding not in ROUNDINGS:
        raise FormatError(f"{where}: unknown rounding {rounding!r}; known are {', '.join(ROUNDINGS)}")
    if not getattr(fmt, "encodable", True):
        raise FormatError(
            f"{where}: {fmt.name} is only decoded here, so nothing can be baked into it; attach the LoRA at run time, "
            "or convert the weight to another format first"
        )


def add_delta(
    fmt: Format,
    parts: Mapping[str, Tensor],
    delta: Tensor,
    *,
    rounding: str = "error_feedback",
    seed: int = 0,
    where: str = "weight",
) -> Added:
    """The parts of `weight + delta` in the same format. delta: [N, K] of any float dtype; parts: plain ones.

    Parts that the change leaves alone are the same tensors. Works on pieces of rows.

    Raises `FormatError` for a format that cannot be encoded, `WeightError` for a change that is not finite or has
    another shape.
    """
    refuse_addition(fmt, rounding, where)
    n, k = fmt.rows_of(parts), delta.shape[-1]
    if delta.dim() != 2 or delta.shape[0] != n or fmt.part_shapes(n, k)["qdata"] != tuple(parts["qdata"].shape):
        raise WeightError(f"{where}: a change of shape {list(delta.shape)} does not fit its parts; take another LoRA")
    if not bool(delta.isfinite().all()):
        raise WeightError(f"{where}: the change holds NaN or infinity; repair the LoRA, or lower its strength")
    job = _Job(fmt, dict(parts), delta, rounding, seed)
    if not delta.numel():
        return _Sums().result(dict(parts))
    return job.by_levels() if job.levelled else job.by_noise()


@dataclass(frozen=True)
class _Job:
    """One addition: its input, and its ways of working."""

    fmt: Format
    parts: Parts
    delta: Tensor
    rounding: str
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    @property
    def levelled(self) -> bool:
        """Whether the grid is one of levels whose neighbours are known."""
        old, _, params = self.rows(0, self._pieces()[0][1], self.parts)
        grid = self.fmt.grid(old, params)
        return type(grid) is Grid and has_cells(grid.levels)

    def _pieces(self) -> list[tuple[int, int]]:
        tall = 1 if self.whole else self.fmt.unit(self.shape)[0]
        return list(row_chunks(*self.shape, max(self.fmt.row_multiple, tall), _ELEMENTS))

    @property
    def whole(self) -> bool:
        """Whether all rows share a scale."""
        return self.fmt.unit(self.shape)[0] >= self.shape[0] > 1

    def rows(self, start: int, stop: int, parts: Parts) -> tuple[Tensor, Tensor, Parts]:
        """Rows of the weight and of the change, prepared (float32 [n, K]), and the parameters of these rows."""
        cut = narrow_rows(self.fmt.rules, parts, start, stop)
        old = self.fmt.decode(self.fmt.unpack(cut["qdata"], self.shape[1]), cut)[:, : self.shape[1]].contiguous()
        change = self.delta[start:stop].to(old.device, torch.float32)
        if self.fmt.pre_quant_scale:
            factor = cut["pre_quant_scale"].float()
            change = torch.where(factor == 0, 0.0, change / factor)
        return old, self.fmt.prepare(change), {rule.name: cut[rule.name] for rule in self.fmt.param_rules}

    # ---- grids of levels --------------------------------------------------------------------------------------------

    def by_levels(self) -> Added:
        """Move levels; unit by unit with a larger step where that is better, or with all parameters fitted anew."""
        kept = self._pass(self.parts, refit=not self.whole)
        if self.whole and kept.clipped:
            kept = _better(kept, self._pass(self.parts, other=self._widened()))
        if kept.clipped and kept.recovered < _ENOUGH:
            kept = _better(kept, self._pass(self.parts, other=self._fitted()))
        return kept

    def _fitted(self) -> Parts:
        """The parameters that the format itself chooses for the sum."""
        total = self.fmt.dequantize(self.parts, self.shape, torch.float32)
        total += self.delta.to(total.device)
        if self.fmt.pre_quant_scale:
            factor = self.parts["pre_quant_scale"].float()
            total = torch.where(factor == 0, 0.0, total / factor)
        names = [rule.name for rule in self.fmt.param_rules]
        fitted = self.fmt.plain.quantize(total)
        return {name: fitted[name].to(self.parts[name].dtype) for name in names}

    def _widened(self) -> Parts:
        """The parameters of a weight whose rows share a scale, with the smallest step that clips nothing."""
        best: tuple[float, Parts] | None = None
        for start, stop in self._pieces():
            old, change, params = self.rows(start, stop, self.parts)
            grid = self.fmt.grid(old + change, params)
            step, zero = _fitting(grid)
            size = float(step.abs().max())
            if best is None or size > best[0]:
                grid.replace_steps(slice(None), *grid.snap(step, zero))
                best = size, self.fmt.with_steps(params, grid)
        assert best is not None
        return best[1]

    def _pass(self, parts: Parts, *, refit: bool = False, other: Parts | None = None) -> Added:
        """One pass over all rows; `other`: parameters of the whole weight to round at instead of its own."""
        out: Parts = {}
        sums = _Sums()
        for start, stop in self._pieces():
            old, change, params = self.rows(start, stop, parts)
            noise = rounding_noise(self.rounding, self.shape[1], start, stop, self.seed, old.device)
            if other is None:
                params, values = self._move(old, change, params, noise, sums, refit=refit)
            else:
                params = narrow_rows(self.fmt.param_rules, other, start, stop)
                grid = self.fmt.grid(old + change, params)
                values = _values(grid, _rounded(grid, self.rounding, noise).levels, self.shape[1])
                count = 1 if self.whole else _count(torch.ones_like(grid.step), grid)
                sums.refitted = sums.clipped = sums.units = count if self.whole else sums.units + count
            codes = self.fmt.encode(self.fmt.from_grid(values, params), params)
            self._measure(codes, params, start, old, sums)
            self.fmt.store_rows(out, {"qdata": self.fmt.pack(codes), **params}, self.shape, start)
        return sums.result({**parts, **out})

    def _move(
        self, old: Tensor, change: Tensor, params: Parts, noise: Tensor | None, sums: _Sums, *, refit: bool
    ) -> tuple[Parts, Tensor]:
        """The parameters and grid values [K, n] of some rows after the change."""
        grid, was = self.fmt.grid(old + change, params), self.fmt.grid(old, params).target
        k = was.shape[0]
        step = grid.spread(grid.step, 0, k)
        levels = grid.levels_of(was, 0, k)
        difference = (grid.target - was).div_(step.masked_fill(step == 0, torch.inf))
        made = moved(grid.levels, levels, difference, self.rounding, noise)
        values = _values(grid, made.levels, k)
        clips = _clips(grid, levels + difference)
        sums.clipped += _count(clips, grid)
        sums.units += _count(torch.ones_like(clips), grid)
        if not refit or not bool(clips.any()):
            return params, values
        wide_step, wide_zero = grid.snap(*_fitting(grid))
        wider = self.fmt.grid(old + change, params)
        wider.replace_steps(slice(None), wide_step, wide_zero)
        again = _rounded(wider, self.rounding, noise)
        # By the error to expect: to choose by what chance made of it would favour few moves, and lose the change.
        better = clips & (_unit_errors(wider, again.expected) < _unit_errors(grid, made.expected))
        better &= wide_step != grid.step  # the nearest step that can be stored may be the old one
        sums.refitted += _count(better, grid)
        zero = None if wide_zero is None or grid.zero is None else torch.where(better, wide_zero, grid.zero)
        values = torch.where(grid.spread(better, 0, k), _values(wider, again.levels, k), values)
        grid.replace_steps(slice(None), torch.where(better, wide_step, grid.step), zero)
        return self.fmt.with_steps(params, grid), values

    # ---- other grids ------------------------------------------------------------------------------------------------

    def by_noise(self) -> Added:
        """By the format's own rounding with noise; fitted anew where too little of the change comes through."""
        if self.rounding != "nearest" and not self.fmt.stochastic:
            raise FormatError(
                f"{self.fmt.name} rounds to nearest only, which loses small changes; attach the LoRA at run time "
                "instead, or ask for rounding='nearest'"
            )
        kept = self._noisy(self.parts)
        if self.rounding == "nearest" or kept.recovered >= _ENOUGH:
            return kept
        return _better(kept, self._noisy(self._fitted(), fitted=True))

    def _noisy(self, params_of: Parts, *, fitted: bool = False) -> Added:
        out: Parts = {}
        sums = _Sums(refitted=int(fitted), clipped=int(fitted), units=1)
        for start, stop in self._pieces():
            old, change, _ = self.rows(start, stop, self.parts)
            params = narrow_rows(self.fmt.param_rules, params_of, start, stop)
            noise = dither(self.rounding, self.shape[1], start, stop, self.seed, old.device)
            codes = self.fmt.encode(old + change, params, noise)
            self._measure(codes, params, start, old, sums)
            self.fmt.store_rows(out, {"qdata": self.fmt.pack(codes), **params}, self.shape, start)
        return sums.result({**self.parts, **out})

    def _measure(self, codes: Tensor, params: Parts, start: int, old: Tensor, sums: _Sums) -> None:
        """Add what the codes of some rows express of the change, in the weight's own basis."""
        n, k = old.shape
        gained = self.fmt.restore(self.fmt.decode(codes, params)[:, :k] - old)
        if self.fmt.pre_quant_scale:
            gained = gained * self.parts["pre_quant_scale"].float()
        change = self.delta[start : start + n].to(old.device, torch.float32)
        sums.change += float(change.square().sum(dtype=torch.float64))
        sums.gained += float((gained * change).sum(dtype=torch.float64))
        sums.error += float((gained - change).square().sum(dtype=torch.float64))


def _better(kept: Added, other: Added) -> Added:
    """The one with the smaller error."""
    return other if other.error < kept.error else kept


def _values(grid: Grid, levels: Tensor, k: int) -> Tensor:
    """What levels [K, n] stand for; writes over them."""
    values = levels.mul_(grid.spread(grid.step, 0, k))
    return values if grid.zero is None else values.add_(grid.spread(grid.zero, 0, k))


def _rounded(grid: Grid, rounding: str, noise: Tensor | None) -> Moved:
    """The target of a grid [K, n] rounded on it, wherever it was before."""
    step = grid.spread(grid.step, 0, grid.target.shape[0])
    shifted = grid.target if grid.zero is None else grid.target - grid.spread(grid.zero, 0, grid.target.shape[0])
    wanted = shifted / step.masked_fill(step == 0, torch.inf)
    nearest = grid.levels.round_(wanted.clone())
    return moved(grid.levels, nearest, wanted - nearest, rounding, noise)


def _fitting(grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The smallest steps, and zeros, at which the target fits between the lowest and the highest level: [U, n]."""
    lowest, highest = extremes(grid.levels)
    high, low = _largest(grid.target, grid), -_largest(-grid.target, grid)
    if grid.zero is not None:
        step = (high - low) / (highest - lowest)
        return step, low - lowest * step
    sign = torch.where(grid.step < 0, -1.0, 1.0)
    above, below = torch.where(sign > 0, high, -low), torch.where(sign > 0, low, -high)
    need = torch.maximum(above.clamp_min(0) / highest, below.clamp_max(0) / lowest if lowest else above * 0)
    return torch.maximum(need, grid.step.abs()) * sign, None


def _clips(grid: Grid, wanted: Tensor) -> Tensor:
    """Units [U, n] with a wanted level [K, n] beyond the last one, or with anything but zeros at a step of 0."""
    lowest, highest = extremes(grid.levels)
    over = torch.maximum(wanted - highest, lowest - wanted)
    clips = _largest(over, grid) > _BEYOND
    return clips | ((grid.step == 0) & (_largest(grid.target.abs(), grid) > 0))


def _largest(x: Tensor, grid: Grid) -> Tensor:
    """The largest x [K, n] of every unit, given to each of its rows: [U, n]."""
    units = _by_unit(x, grid, -torch.inf).amax(1)
    if grid.rows == 1:
        return units
    tall = _by_rows(units, grid.rows, -torch.inf).amax(2)
    return tall.repeat_interleave(grid.rows, dim=1)[:, : x.shape[1]]


def _unit_errors(grid: Grid, squares: Tensor) -> Tensor:
    """Squared errors [K, n] in levels, summed over units in the weight's measure, given to each row: [U, n]."""
    squares = squares * grid.spread(grid.step, 0, squares.shape[0]).square()
    if grid.factor is not None:
        squares = squares * grid.factor.square().unsqueeze(1)
    units = _by_unit(squares, grid, 0.0).sum(1)
    if grid.rows == 1:
        return units
    tall = _by_rows(units, grid.rows, 0.0).sum(2)
    return tall.repeat_interleave(grid.rows, dim=1)[:, : squares.shape[1]]


def _by_unit(x: Tensor, grid: Grid, fill: float) -> Tensor:
    """[K, n] -> [U, columns, n]."""
    missing = -x.shape[0] % grid.columns
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill).unflatten(0, (-1, grid.columns))


def _by_rows(x: Tensor, rows: int, fill: float) -> Tensor:
    """[U, n] -> [U, blocks of rows, rows]."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % rows), value=fill).unflatten(1, (-1, rows))


def _count(units: Tensor, grid: Grid) -> int:
    """How many units are marked in [U, n], where each row of a unit has its mark."""
    return int(units[:, :: grid.rows].sum())
