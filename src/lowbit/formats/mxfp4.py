"""mxfp4: a 4-bit floating-point code a weight and a power of two for every 32 of them (OCP Microscaling v1.0).

    w = code * 2 ** (scale - 127)        code: e2m1 (0 .5 1 1.5 2 3 4 6 and a sign)    scale: uint8, an e8m0 code

part    shape                   meaning
qdata   [N, 16 * ceil(K / 32)]  uint8, the even column in the low nibble; code 0 fills a last group cut short
scale   [N, ceil(K / 32)]       linear; 0 (2 ** -127) for a zero group, 255 would be NaN

The groups lie along K. The scale is the smallest power of two s with amax <= 7 s, found from the bits of amax. The
specification divides the power of two below amax by 4, whatever the mantissa, which clips up to 8 s to 6 s and costs
0.23 dB; never to clip costs 0.27 dB. For amax in (6 s, 7 s] the clipped scale loses no more than its double at any
weight, so 7 s is where to stop: see `candidates`. The order of nibbles and scales in files is a dialect's business.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("mxfp4")
>>> parts = fmt.quantize(torch.tensor([[7.0] * 32 + [7.5] * 32]))
>>> parts["scale"].tolist()
[[127, 128]]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.formats.base import Candidate, Format
from lowbit.formats.e8m0_scales import GROUP, codes_for, codes_of_steps, fitted_and_half, scale_down, scale_up
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, N, Part, Parts
from lowbit.formats.registry import register
from lowbit.formats.stored_steps import PowerSteps
from lowbit.numerics.floats import E2M1_MAX, e2m1_codes, e2m1_values, e8m0_values, round_to_e2m1
from lowbit.numerics.groups import group_amax, pad_to
from lowbit.numerics.levels import E2M1
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

_REACH_EXPONENT = 2  # of the largest weight that a scale of 1 is taken for, 7 = 1.75 * 2**2


@register
@dataclass(frozen=True)
class Mxfp4(Format):
    """e2m1 codes with a power-of-two scale per 32 weights: 4.25 bits a weight."""

    name: ClassVar[str] = "mxfp4"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {
        "comfy": {"qdata": "weight", "scale": "weight_scale"},
        "compressed_tensors": {"qdata": "weight_packed", "scale": "weight_scale"},
    }
    golden_sqnr: ClassVar = {"mxfp4": 19.02}
    data_free_solver: ClassVar[str] = "scale_search"

    def part_rules(self) -> tuple[Part, ...]:
        """Packed codes and the code of a power of two a group."""
        return (
            Part("qdata", (N, Dim("K", GROUP, GROUP // 2)), (torch.uint8,)),
            Part("scale", (N, Dim("K", GROUP)), (torch.uint8,)),
        )

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        """The smallest power of two that is at least amax / 7, in each group."""
        return {"scale": codes_for(group_amax(rows, GROUP), _REACH_EXPONENT).to(torch.uint8)}

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """uint8 codes 0..15, [n, 32 * ceil(K / 32)]. Zeros keep their sign, except under the lowest scale."""
        scaled = scale_down(rows, params["scale"])
        lowest = params["scale"] == 0
        if bool(lowest.any()):
            scaled[lowest] += 0.0  # turns the negative zeros of a zero group into positive ones
        if noise is not None:
            noise = pad_to(noise, rows.shape[0], scaled.shape[1] * GROUP).view(scaled.shape)
        return e2m1_codes(round_to_e2m1(scaled, noise)).flatten(1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 [n, 32 * ceil(K / 32)]."""
        return scale_up(e2m1_values(codes), params["scale"])

    def pack(self, codes: Tensor) -> Tensor:
        """The even column in the low nibble."""
        return pack_nibbles(codes)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        """All stored codes, those that fill the last group included."""
        return unpack_nibbles(qdata)

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        """`decode(encode(rows))` [n, K] without making codes; the sign of a zero may differ."""
        values = E2M1.round_(scale_down(rows, params["scale"]))
        return scale_up(values, params["scale"])[:, : rows.shape[1]]

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        """One row of 32 columns."""
        return 1, GROUP

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """All scales that can be best for a group: a sweep over the 255 powers of two finds no smaller error.

        Write s for the fitted scale, 3.5 s < amax <= 7 s (s is the unit below).

        Above: a scale t >= 2 is no better than t / 2, for each weight alone, so for weighted errors too. As
        amax <= 3.5 t, only 0 .5 1 1.5 2 3 times t can be nearest, or 4 t in a tie with 3 t. These are 0 1 2 3 4 6 times
        t / 2; and a weight x in (3 t, 3.5 t], which is clipped there, becomes 3 t under both.

        Below: 1 / 2 differs from 1 for weights under 1, where it gains at most (1 / 4)**2 each, and for those it clips,
        above 3. It pays where the largest is near 4 and the others are small. 1 / 4 gains at most (1 / 8)**2 on 1 / 2,
        with 31 weights less than a half, and loses (amax - 1.5)**2 - (amax - 3)**2 = 3 amax - 6.75 > 3.75.

        `bound` is what clipping costs the largest weight alone; like the limit below it is meant for unweighted errors.
        """
        return fitted_and_half(rows, params, _REACH_EXPONENT, E2M1_MAX)

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        """A refitted scale is the nearest power of two."""
        step = e8m0_values(params["scale"]).t().contiguous()
        return Grid(rows.t().contiguous(), step, E2M1, columns=GROUP, snap=PowerSteps())

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        """The codes of steps that are powers of two."""
        return {"scale": codes_of_steps(grid.step.t().contiguous())}
