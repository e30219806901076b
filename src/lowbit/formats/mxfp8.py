"""mxfp8: an 8-bit floating-point code a weight and a power of two for every 32 of them (OCP Microscaling v1.0).

    w = code * 2 ** (scale - 127)        code: float8_e4m3fn (max 448)    scale: uint8, the code of an e8m0 value

part    shape                   meaning
qdata   [N, 32 * ceil(K / 32)]  float8_e4m3fn; a last group cut short is filled with zeros
scale   [N, ceil(K / 32)]       linear; 0 (2 ** -127) for a zero group, 255 would be NaN

The groups lie along K. The scale is rounded up, to the smallest power of two that is at least amax / 448, so nothing is
clipped; rounding it down, as the specification suggests, clips up to half of the largest weight and costs 1 dB. It is
found from the bits of amax, exactly. How files order the scales is a dialect's business.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("mxfp8")
>>> parts = fmt.quantize(torch.tensor([[448.0] * 32 + [449.0] * 32]))
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
from lowbit.numerics.floats import E4M3_MAX, e8m0_values, from_fp8, stochastic_to_fp8, to_fp8
from lowbit.numerics.groups import group_amax, pad_to
from lowbit.numerics.levels import E4M3

_LARGEST_EXPONENT = 8  # of the largest e4m3 value, 448 = 1.75 * 2**8


@register
@dataclass(frozen=True)
class Mxfp8(Format):
    """float8_e4m3fn codes with a power-of-two scale per 32 weights: 8.25 bits a weight."""

    name: ClassVar[str] = "mxfp8"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {"comfy": {"qdata": "weight", "scale": "weight_scale"}}
    golden_sqnr: ClassVar = {"mxfp8": 31.51}

    def part_rules(self) -> tuple[Part, ...]:
        """Codes and the code of a power of two a group."""
        return (
            Part("qdata", (N, Dim("K", GROUP, GROUP)), (torch.float8_e4m3fn,)),
            Part("scale", (N, Dim("K", GROUP)), (torch.uint8,)),
        )

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        """The smallest power of two that clips nothing, in each group."""
        return {"scale": codes_for(group_amax(rows, GROUP), _LARGEST_EXPONENT).to(torch.uint8)}

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """float8_e4m3fn codes [n, 32 * ceil(K / 32)]."""
        scaled = scale_down(rows, params["scale"])
        lowest = params["scale"] == 0
        if bool(lowest.any()):
            scaled[lowest] += 0.0  # turns the negative zeros of a zero group into positive ones, as others store them
        flat = scaled.flatten(1)
        if noise is None:
            return to_fp8(flat, torch.float8_e4m3fn)
        return stochastic_to_fp8(flat, torch.float8_e4m3fn, pad_to(noise, *flat.shape))

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 [n, 32 * ceil(K / 32)]."""
        return scale_up(from_fp8(codes), params["scale"])

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        """`decode(encode(rows))` [n, K]."""
        codes = to_fp8(scale_down(rows, params["scale"]), torch.float8_e4m3fn)
        return scale_up(from_fp8(codes), params["scale"])[:, : rows.shape[1]]

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        """One row of 32 columns."""
        return 1, GROUP

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """All scales that can be best for a group: a sweep over the 255 powers of two finds no smaller error.

        Write s for the smallest that does not clip, amax <= 448 s. Twice a scale t >= s is no better than t, for any
        weight: within 448 t, every e4m3 value doubled is an e4m3 value. Halving s gains only below 2**-6 s, at most
        2**-20 s**2 a weight; that pays where the largest would be rounded down to 224 s anyway. At s / 4 and less a
        weight above 112 s gains nothing, 112 being a value of s, and the largest loses (224 - 112)**2 s**2 or more.

        `bound` is what clipping costs the largest weight alone; like the limit below s it is meant for unweighted
        errors.
        """
        return fitted_and_half(rows, params, _LARGEST_EXPONENT, E4M3_MAX)

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        """A refitted scale is the nearest power of two."""
        step = e8m0_values(params["scale"]).t().contiguous()
        return Grid(rows.t().contiguous(), step, E4M3, columns=GROUP, snap=PowerSteps())

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        """The codes of steps that are powers of two."""
        return {"scale": codes_of_steps(grid.step.t().contiguous())}
