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

from .grid_units import clipped_units, count_units, stored_steps, unit_errors, unused_errors
from .rounding_cells import ROUNDINGS, Choice, choice, has_cells, rounding_noise

_ELEMENTS = 1 << 18  # of a piece of rows: stays in a core's cache
_WORTH = 0.05  # of a unit's error: what clipping must cost before a larger step is tried
_MOST_SPREAD = 1.3  # how much more often weights move at most, for those of their row that cannot
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
    if not fmt.encodable:
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
    return job.by_levels() if job.levelled else job.by_codes()


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
            step, zero = stored_steps(grid)
            size = float(step.abs().max())
            if best is None or size > best[0]:
                grid.replace_steps(slice(None), step, zero)
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
                values = _settled(grid, _anew(grid, self.rounding), self.fmt.grid(old, params).target, noise)
                count = 1 if self.whole else count_units(torch.ones_like(grid.step), grid)
                sums.refitted = sums.clipped = sums.units = count if self.whole else sums.units + count
            codes = self.fmt.encode(self.fmt.from_grid(values, params), params)
            self._measure(codes, params, start, old, sums)
            self.fmt.store_rows(out, {**params, "qdata": self.fmt.pack(codes)}, self.shape, start)
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
        chosen = choice(grid.levels, levels, difference, self.rounding)
        clips, loss = clipped_units(grid, levels + difference)
        sums.clipped += count_units(clips, grid)
        sums.units += count_units(torch.ones_like(clips), grid)
        unused, lost = unused_errors(grid)
        expected = torch.where(unused, lost, unit_errors(grid, chosen.expected))
        clips &= (loss > _WORTH * expected) | unused
        if not refit or not bool(clips.any()):
            return params, _settled(grid, chosen, was, noise)
        wide_step, wide_zero = stored_steps(grid)
        wider = self.fmt.grid(old + change, params)
        wider.replace_steps(slice(None), wide_step, wide_zero)
        again = _anew(wider, self.rounding)
        # By the error to expect: to choose by what chance made of it would favour few moves, and lose the change.
        better = clips & (unit_errors(wider, again.expected) < expected)
        better &= wide_step != grid.step  # the nearest step that can be stored may be the old one
        sums.refitted += count_units(better, grid)
        zero = None if wide_zero is None or grid.zero is None else torch.where(better, wide_zero, grid.zero)
        grid.replace_steps(slice(None), torch.where(better, wide_step, grid.step), zero)
        taken = grid.spread(better, 0, k)
        pairs = ((again.near, chosen.near), (again.far, chosen.far), (again.share, chosen.share))
        near, far, share = (torch.where(taken, new, kept) for new, kept in pairs)
        mixed = Choice(near, far, share, chosen.expected)
        return self.fmt.with_steps(params, grid), _settled(grid, mixed, was, noise)

    # ---- other grids ------------------------------------------------------------------------------------------------

    def by_codes(self) -> Added:
        """Move to the next code where codes are ordered as what they mean; fitted anew where that is not enough."""
        kept = self._coded(self.parts)
        if kept.recovered >= _ENOUGH or self.rounding == "nearest":
            return kept
        return _better(kept, self._coded(self._fitted(), fitted=True))

    def _coded(self, params_of: Parts, *, fitted: bool = False) -> Added:
        out: Parts = {}
        sums = _Sums(refitted=int(fitted), clipped=int(fitted), units=1)
        for start, stop in self._pieces():
            old, change, _ = self.rows(start, stop, self.parts)
            params = narrow_rows(self.fmt.param_rules, params_of, start, stop)
            codes = self.fmt.encode(old + change, params)
            noise = rounding_noise(self.rounding, self.shape[1], start, stop, self.seed, old.device)
            if noise is not None:
                codes = self._neighbours(codes, old, change, params, noise).to(codes.dtype)
            self._measure(codes, params, start, old, sums)
            self.fmt.store_rows(out, {**params, "qdata": self.fmt.pack(codes)}, self.shape, start)
        return sums.result({**self.parts, **out})

    def _neighbours(self, codes: Tensor, old: Tensor, change: Tensor, params: Parts, noise: Tensor) -> Tensor:
        """The codes [n, K] around those that are nearest to `old + change`."""
        fmt, wanted, far_out = self.fmt, old + change, 1e4 * (old + change).abs().max() + 1.0
        lowest, highest = (fmt.encode(torch.full_like(old, sign) * far_out, params) for sign in (-1.0, 1.0))
        mine = fmt.decode(codes, params)
        below, above = torch.maximum(codes, lowest + 1) - 1, torch.minimum(codes + 1, highest)
        ends = fmt.decode(below, params), fmt.decode(above, params)
        if bool((ends[0] > mine).any() | (ends[1] < mine).any()):
            raise FormatError(f"{fmt.name}: its codes are not ordered, so no change can be added; use rounding=nearest")
        over, up = wanted >= mine, change >= 0
        low, high = torch.where(over, codes, below), torch.where(over, above, codes)
        low_value, high_value = torch.where(over, mine, ends[0]), torch.where(over, ends[1], mine)
        near, far = torch.where(up, low_value, high_value), torch.where(up, high_value, low_value)
        share = torch.where(far == near, 0.0, (wanted - near) / (far - near)).clamp_(0.0, 1.0)
        near_code, far_code = torch.where(up, low, high).float().t(), torch.where(up, high, low).float().t()
        reached = torch.lerp(near, far, share) - old
        share = _spread_out(share.t(), change.t(), reached.t())
        return Choice(near_code, far_code, share, share).settle(share, noise).t().contiguous()

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


def _settled(grid: Grid, chosen: Choice, was: Tensor, noise: Tensor | None) -> Tensor:
    """The values [K, n] that come of a choice, with what cannot be expressed of a row's change spread over the row.

    was: the target [K, n] before the change.
    """
    if noise is None:
        return _values(grid, chosen.settle(chosen.share, noise))
    factor = 1.0 if grid.factor is None else grid.factor.unsqueeze(1)
    reached = (_values(grid, torch.lerp(chosen.near, chosen.far, chosen.share)) - was) * factor
    share = _spread_out(chosen.share, (grid.target - was) * factor, reached)
    return _values(grid, chosen.settle(share, noise))


def _spread_out(share: Tensor, wanted: Tensor, reached: Tensor) -> Tensor:
    """Shares [K, n] so much larger that a row's change reaches what is wanted of it, as far as that goes."""
    whole, kept = wanted.square().sum(0), (wanted * reached).sum(0)
    more = torch.where(kept > 0, whole / kept, 1.0).clamp_(1.0, _MOST_SPREAD)
    return (share * more).clamp_(max=1.0)


def _values(grid: Grid, levels: Tensor) -> Tensor:
    """What levels [K, n] stand for; writes over them."""
    k = levels.shape[0]
    values = levels.mul_(grid.spread(grid.step, 0, k))
    return values if grid.zero is None else values.add_(grid.spread(grid.zero, 0, k))


def _anew(grid: Grid, rounding: str) -> Choice:
    """The choice for the target of a grid wherever it was before."""
    step = grid.spread(grid.step, 0, grid.target.shape[0])
    shifted = grid.target if grid.zero is None else grid.target - grid.spread(grid.zero, 0, grid.target.shape[0])
    wanted = shifted / step.masked_fill(step == 0, torch.inf)
    nearest = grid.levels.round_(wanted.clone())
    return choice(grid.levels, nearest, wanted - nearest, rounding)
