"""nvfp4: a 4-bit floating-point code a weight, an 8-bit scale for every 16 of them, and one float32 scale for all.

    w = code * (scale * global_scale)    code: e2m1 (0 .5 1 1.5 2 3 4 6 and a sign)    scale: float8_e4m3fn

part           shape                  meaning
qdata          [N, 8 * ceil(K / 16)]  uint8, the even column in the low nibble; code 0 fills a last group cut short
scale          [N, ceil(K / 16)]      linear; 0 exactly where all codes of the group are 0
global_scale   []                     amax / 2688 (6 * 448), so that the largest group just fits; 1 for a zero weight

field                  changes
global_scale_divides   w = code * (scale / global_scale), global_scale = 2688 / amax: what compressed-tensors stores
row_global_scale       global_scale [N], one for every row: projections fused into one weight, each with its own

The groups lie along K. The order of nibbles and of scales in files differs by convention and is a dialect's business.
Products and quotients are float32 in the order above: codes and values are those of comfy-kitchen and, with a divisor,
those of compressed-tensors bit for bit.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("nvfp4")
>>> parts = fmt.quantize(torch.arange(32.0).reshape(1, 32))
>>> parts["scale"].float().tolist()
[[224.0, 448.0]]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.formats.base import Candidate, Format, whole_amax
from lowbit.formats.global_scale import LARGEST_GROUP, GlobalScale
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, N, Part, Parts
from lowbit.formats.registry import one_of, register
from lowbit.formats.stored_steps import E4m3Steps
from lowbit.numerics.floats import E2M1_MAX, divisor, e2m1_codes, e2m1_values, from_fp8, round_to_e2m1, to_fp8
from lowbit.numerics.groups import group_amax, pad_to
from lowbit.numerics.levels import E2M1
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

GROUP = 16
_LARGEST = 0x7E  # the code of 448; 0x7f is NaN. Codes of positive e4m3 values are ordered as their values are.
_OCTAVE = 8  # codes from a scale to its double
_LOWEST_NORMALS = 15  # up to this code e4m3 values lie 2**-9 apart: half an odd one is not a value
_INF = float("inf")


@register
@dataclass(frozen=True)
class Nvfp4(Format):
    """e2m1 codes with an e4m3 scale per 16 weights: 4.5 bits a weight, the native format of NVIDIA Blackwell."""

    global_scale_divides: bool = False
    row_global_scale: bool = False

    name: ClassVar[str] = "nvfp4"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {
        "comfy": {"qdata": "weight", "scale": "weight_scale", "global_scale": "weight_scale_2"},
        "modelopt": {"qdata": "weight", "scale": "weight_scale", "global_scale": "weight_scale_2"},
        "compressed_tensors": {
            "qdata": "weight_packed",
            "scale": "weight_scale",
            "global_scale": "weight_global_scale",
        },
    }
    golden_sqnr: ClassVar = {
        "nvfp4": 20.44,
        "nvfp4(global_scale_divides=True)": 20.44,
        "nvfp4(row_global_scale=True)": 20.44,
        "nvfp4(global_scale_divides=True,row_global_scale=True)": 20.44,
    }
    largest_activation: ClassVar[float] = LARGEST_GROUP
    data_free_solver: ClassVar[str] = "scale_search"

    def __post_init__(self) -> None:
        one_of(self, "global_scale_divides", (False, True))
        one_of(self, "row_global_scale", (False, True))

    def part_rules(self) -> tuple[Part, ...]:
        """Packed codes, a scale a group, and the one that all groups share, or those of a row."""
        return (
            Part("qdata", (N, Dim("K", GROUP, GROUP // 2)), (torch.uint8,)),
            Part("scale", (N, Dim("K", GROUP)), (torch.float8_e4m3fn,)),
            Part("global_scale", (N,) if self.row_global_scale else (), (torch.float32,)),
        )

    @cached_property
    def _global(self) -> GlobalScale:
        return GlobalScale(self.global_scale_divides, self.row_global_scale)

    def _steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """The value of code 1.0 in each group: float32 [n, G]."""
        return self._global.times(from_fp8(params["scale"]), self._global.beside_groups(params))

    def _reach(self, scale: Tensor, global_scale: Tensor) -> Tensor:
        """The largest magnitude that a group with this scale can hold."""
        return self._global.times(from_fp8(scale).mul_(E2M1_MAX), global_scale)

    def _nearest_scale(self, amax: Tensor, global_scale: Tensor) -> Tensor:
        """The e4m3 value nearest to amax / 6; 0 under a global scale of 0 (a caller's: ours never is)."""
        wanted = self._global.over(amax / divisor(E2M1_MAX, amax), global_scale).masked_fill_(global_scale == 0, 0.0)
        return to_fp8(wanted, torch.float8_e4m3fn)

    def fit_shared(self, w: Tensor) -> Parts:
        """The global scale: with it the largest group of the weight gets the largest scale."""
        return {} if self.row_global_scale else {"global_scale": self._global.fitted(whole_amax(w))}

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        """The e4m3 scale nearest to amax / 6 in each group. `shared` holds the global scale, if rows share it."""
        amax = group_amax(rows, GROUP)
        params = dict(shared) if shared else {"global_scale": self._global.fitted(amax.amax(dim=1))}
        return {"scale": self._nearest_scale(amax, self._global.beside_groups(params)), **params}

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """uint8 codes 0..15, [n, 16 * ceil(K / 16)]. Zeros keep their sign, except in a group whose scale is 0."""
        steps = self._steps(params)
        noise = None if noise is None else _grouped(noise, steps)
        codes = e2m1_codes(round_to_e2m1(_divide(rows, steps), noise))
        dead = steps == 0
        if bool(dead.any()):
            codes.mul_((~dead).to(torch.uint8).unsqueeze(-1))  # +0, where rounding kept the sign of the weight
        return codes.flatten(1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 [n, 16 * ceil(K / 16)]."""
        steps = self._steps(params)
        values = e2m1_values(codes).view(*steps.shape, GROUP)
        return values.mul_(steps.unsqueeze(-1)).flatten(1)

    def pack(self, codes: Tensor) -> Tensor:
        """The even column in the low nibble."""
        return pack_nibbles(codes)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        """All stored codes, those that fill the last group included."""
        return unpack_nibbles(qdata)

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        """`decode(encode(rows))` [n, K] without making codes; the sign of a zero may differ."""
        steps = self._steps(params)
        values = _round_in_place(_divide(rows, steps)).mul_(steps.unsqueeze(-1))
        return values.flatten(1)[:, : rows.shape[1]]

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        """One row of 16 columns."""
        return 1, GROUP

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """All scales that can be best for a group: a sweep over the 126 positive ones finds no smaller error.

        Write s for the smallest scale that does not clip, amax <= 6 s (in units of the global scale), or for the
        largest one.

        Above: a scale t >= 2 s is no better than t / 2. As amax <= 3 t, only 0 .5 1 1.5 2 3 times t can be nearest, and
        these are 0 1 2 3 4 6 times t / 2. It holds for each weight alone, so for weighted errors too. Only where t / 2
        is no e4m3 value, at odd multiples of 2**-9, the search goes on.

        Below: a scale t <= s / 2 is worse than s. Take s as the unit. Its predecessor is at least 7/8 (if it is
        smaller, s is so small that everything below it is tried), so amax > 5.25 and the largest weight loses at least
        (5.25 - 3)**2 - (6 - 5.25)**2 = 4.5. Another weight x >= 3 gains nothing: 3 is a value of s, and closer than the
        clipped 6 t. One with x < 3 gains at most 0.5**2, all 15 together 3.75.

        `bound` is what clipping costs the largest weight alone; like the limit below s it is meant for unweighted
        errors.
        """
        amax, global_scale = group_amax(rows, GROUP), params["global_scale"]
        columns = self._global.beside_groups(params)
        nearest = self._nearest_scale(amax, columns)
        clips = self._reach(nearest, columns) < amax
        first = (nearest.view(torch.uint8).to(torch.int16) + clips).clamp_max_(_LARGEST)  # the codes of s
        start = params["scale"].view(torch.uint8).to(torch.int16)

        at_first = start == first  # rounding to nearest starts at s or just below it; the other one comes first
        yield _candidate(first - at_first.to(torch.int16), global_scale)
        for up in range(1, _OCTAVE):
            yield _candidate(first + up, global_scale)
        if bool(((first < _OCTAVE) & (amax > 0)).any()):
            for up in range(_OCTAVE, _LOWEST_NORMALS):
                bound = torch.zeros_like(amax).masked_fill_(first + up > _LOWEST_NORMALS, _INF)
                yield _candidate(first + up, global_scale, bound)
        for down in range(1, _OCTAVE):
            candidate = _candidate(first - down, global_scale)
            bound = (amax - self._reach(candidate.params["scale"], columns)).clamp_min_(0.0).square_()
            done = first <= down
            if down == 1:
                done |= at_first | (start == first - 1)
            yield Candidate(candidate.params, bound.masked_fill_(done, _INF))

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        """A refitted scale is the nearest positive e4m3 value; the global scale stays."""
        snap = E4m3Steps(self._global, params["global_scale"])
        return Grid(rows.t().contiguous(), self._steps(params).t().contiguous(), E2M1, columns=GROUP, snap=snap)

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        """The steps over the global scale, as e4m3: exactly the values that `grid` and its `snap` give."""
        by_row = self._global.over(grid.step.t(), self._global.beside_groups(params)).contiguous()
        return {"scale": to_fp8(by_row, torch.float8_e4m3fn), "global_scale": params["global_scale"]}

    def equivalents(self) -> tuple[Format, ...]:
        """The same with the reciprocal of the global scale."""
        return (replace(self, global_scale_divides=not self.global_scale_divides),)

    def recast(self, parts: Mapping[str, Tensor], other: Format) -> Parts:
        """See `Format.recast`. A reciprocal is rounded: values may change in the last bit of a float32."""
        if not isinstance(other, Nvfp4) or other not in self.equivalents():
            return super().recast(parts, other)
        return self._recast(parts, other)

    def joined(self, weights: Sequence[Mapping[str, Tensor]]) -> tuple[Format, list[Parts]]:
        """With a global scale for each row where those of the weights differ: every value stays what it was."""
        first = weights[0]["global_scale"]
        if self.row_global_scale or all(_same(parts["global_scale"], first) for parts in weights):
            return super().joined(weights)
        by_row = replace(self, row_global_scale=True)
        return by_row, [self._recast(parts, by_row) for parts in weights]

    def _recast(self, parts: Mapping[str, Tensor], other: Nvfp4) -> Parts:
        wanted = GlobalScale(other.global_scale_divides, other.row_global_scale)
        return {**parts, "global_scale": self._global.recast(parts["global_scale"], wanted, self.rows_of(parts))}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)  # pieces of one weight need no look


def _candidate(codes: Tensor, global_scale: Tensor, bound: Tensor | None = None) -> Candidate:
    """Scales by their codes (int16 [n, G]), kept within the positive finite ones."""
    scale = codes.clamp(1, _LARGEST).to(torch.uint8).view(torch.float8_e4m3fn)
    return Candidate({"scale": scale, "global_scale": global_scale}, bound)


def _divide(rows: Tensor, steps: Tensor) -> Tensor:
    """Rows in units of their steps, by groups: [n, G, 16]. A step of zero gives zeros."""
    return _grouped(rows, steps) / steps.masked_fill(steps == 0, _INF).unsqueeze(-1)


def _grouped(rows: Tensor, steps: Tensor) -> Tensor:
    """Rows [n, K] by the groups [n, G] of their steps: [n, G, 16], filled with zeros."""
    n, groups = steps.shape
    return pad_to(rows, n, groups * GROUP).unflatten(1, (groups, GROUP))


def _round_in_place(x: Tensor) -> Tensor:
    """`round_to_e2m1` for a search: writes over x and drops the sign of zeros, for a third fewer operations."""
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    magic = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(1.5 * 2.0**22)
    return x.add_(magic).sub_(magic)
