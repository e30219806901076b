"""awq_w4a16: an unsigned 4-bit code a weight, with a scale and an offset for every group along K.

    w = (code - 8) * scale + zero          code: 0..15

part     shape      meaning
qdata    [N, K/2]   int8 bytes, the even column in the low nibble
scale    [K/g, N]   bfloat16, float16 or float32, as the weight was; positive
zero     [K/g, N]   the same dtype; an offset in units of the weight (what code 8 decodes to), not an integer zero point

This is the storage of comfy-kitchen and of the modulation layers in SVDQuant checkpoints (group 64); it differs from
that of AutoAWQ in order, packing and in what "zero" means. The grid of a group spans its minimum and maximum. Scale
and offset are rounded to their stored dtype before the codes are chosen, so their rounding costs nothing that a code
can repair.

With `wzeros` both are float32, and what a file of nunchaku keeps of them in 16 bits is exact: the scale, and
wzeros = zero - 8 * scale, what code 0 decodes to. Any kernel reads such parts; they are other parameters, not other
codes.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("awq_w4a16(group_size=4)")
>>> parts = fmt.quantize(torch.tensor([[-3.0, 0.0, 4.5, 1.5]]))
>>> parts["scale"].tolist(), parts["zero"].tolist()
([[0.5]], [[1.0]])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats.base import Candidate, Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, N, Part, Parts
from lowbit.formats.registry import one_of, register
from lowbit.formats.stored_steps import FloatSteps
from lowbit.numerics.floats import divisor
from lowbit.numerics.integers import round_clamp_
from lowbit.numerics.levels import IntegerLevels
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

LEVELS = 16
MIDDLE = 8  # the code that decodes to `zero`
_LEVELS = IntegerLevels(-MIDDLE, LEVELS - 1 - MIDDLE)
MIN_STORED_SCALE = 2.0**-24  # the smallest positive float16: no stored dtype rounds it to zero
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLEST_SHARE = 2.0**-14  # of |wzeros| that a scale may be, and of a scale that wzeros may be: in float32, 11 bits of
_SMALLEST_LOW = 2.0**-8  # one and 8 times the other then add up without rounding
# Parts of the range to give up at the lower and the upper end, found greedily on Gaussian groups of 64: each in turn
# lowers the squared error most. The first three give 0.6 dB, all six 0.7; a grid of 121 would give 0.8.
TRIMS = ((0.0, 0.03), (0.03, 0.0), (0.03, 0.03), (0.0, 0.045), (0.045, 0.0), (0.015, 0.015))


@register
@dataclass(frozen=True)
class AwqW4A16(Format):
    """Unsigned 4-bit codes with a scale and an additive zero per group: 4.5 bits a weight at group 64."""

    group_size: int = 64
    wzeros: str = "none"

    name: ClassVar[str] = "awq_w4a16"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {"comfy": {"qdata": "weight", "scale": "weight_scale", "zero": "weight_zero"}}
    golden_sqnr: ClassVar = {
        "awq_w4a16": 20.94,
        "awq_w4a16(group_size=32)": 22.13,
        "awq_w4a16(group_size=128)": 20.02,
        "awq_w4a16(wzeros=bfloat16)": 20.94,
    }
    data_free_solver: ClassVar[str] = "scale_search"

    def __post_init__(self) -> None:
        size: object = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise FormatError(f"{self.name}: group_size is {size!r}, expected a positive number of columns such as 64")
        one_of(self, "wzeros", ("none", *_HALVES))

    def part_rules(self) -> tuple[Part, ...]:
        by_group = (Dim("K", self.group_size), N)
        return (
            Part("qdata", (N, Dim("K", 2)), (torch.int8,)),
            Part("scale", by_group, _DTYPES),
            Part("zero", by_group, _DTYPES),
        )

    def check_shape(self, n: int, k: int) -> str | None:
        if k % self.group_size:
            return f"has {k} columns, not a multiple of the group size {self.group_size}"
        return f"has {k} columns; two codes share a byte, so their number must be even" if k % 2 else None

    def part_dtypes(self, source: torch.dtype) -> dict[str, torch.dtype]:
        """See `Format.part_dtypes`: float32 with `wzeros`, whose sum with 8 scales 16 bits do not hold."""
        wide = dict.fromkeys(("scale", "zero"), torch.float32) if self.wzeros in _HALVES else {}
        return {**super().part_dtypes(source), **wide}

    def equivalents(self) -> tuple[Format, ...]:
        """With and without `wzeros`: the same parts, as long as they are exact there."""
        return tuple(replace(self, wzeros=name) for name in ("none", *_HALVES) if name != self.wzeros)

    def recast(self, parts: Mapping[str, Tensor], other: Format) -> Parts:
        """See `Format.recast`. Who stores `wzeros` checks that they are exact."""
        if other not in self.equivalents():
            return super().recast(parts, other)
        stays = other.config()["wzeros"] == "none"
        wide = {} if stays else {name: parts[name].float() for name in ("scale", "zero")}
        return {**parts, **wide}

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        return self._grid(*self._extremes(rows), torch.float32)

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        return self._codes(rows, params, noise).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        return self._values(self._groups(codes).float(), params)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes).view(torch.int8)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        return unpack_nibbles(qdata)

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        return self._values(self._codes(rows, params), params)

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self.group_size

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """Narrower grids: a clipped end costs less than coarser steps for all the others."""
        low, high = self._extremes(rows)
        for below, above in TRIMS:
            trimmed = low + (high - low) * below, high - (high - low) * above
            yield Candidate(self._grid(*trimmed, params["scale"].dtype))

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        step, zero = params["scale"].float(), params["zero"].float()

        def snap(step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
            assert zero is not None
            return self._snapped(step, zero - MIDDLE * step)

        plain = FloatSteps(MIN_STORED_SCALE, dtype=params["scale"].dtype, zero_dtype=params["zero"].dtype)
        columns, target = self.group_size, rows.t().contiguous()
        chosen = snap if self.wzeros in _HALVES else plain
        return Grid(target, step.clone(), _LEVELS, columns=columns, zero=zero.clone(), snap=chosen)

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        assert grid.zero is not None
        return {"scale": grid.step.to(params["scale"].dtype), "zero": grid.zero.to(params["zero"].dtype)}

    def _groups(self, x: Tensor) -> Tensor:
        """[n, K] -> [n, K/g, g]."""
        return x.unflatten(1, (x.shape[1] // self.group_size, self.group_size))

    def _extremes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of each group: [n, K/g] each."""
        groups = self._groups(rows)
        return groups.amin(dim=-1), groups.amax(dim=-1)

    def _grid(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Parts:
        """Scale and zero [K/g, n] of the grid whose code 0 is `low` and whose code 15 is `high` ([n, K/g])."""
        half_span = high * 0.5 - low * 0.5  # the whole one could overflow
        scale = (half_span / divisor((LEVELS - 1) / 2, half_span)).clamp_min_(MIN_STORED_SCALE).t().contiguous()
        if self.wzeros in _HALVES:
            scale, zero = self._snapped(scale, low.t())
            return {"scale": scale, "zero": zero}
        scale = scale.to(dtype)
        return {"scale": scale, "zero": (low.t() + MIDDLE * scale.float()).to(dtype)}

    def _snapped(self, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero, float32, where the scale and `low`, what code 0 decodes to, are rounded to 16 bits.

        Their sum is exact: a scale too small beside `low` grows, and a `low` too small beside the scale is 0.
        """
        half = _HALVES[self.wzeros]
        low = low.to(half).float()
        scale = scale.clamp_min(MIN_STORED_SCALE).maximum(low.abs() * _SMALLEST_SHARE).to(half).float()
        low = torch.where(low.abs() < scale * _SMALLEST_LOW, 0.0, low)
        return scale, low + MIDDLE * scale

    def _codes(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """Codes as float32 [n, K/g, g]."""
        steps = self._groups(rows) - _spread(params["zero"])
        steps.div_(_spread(params["scale"])).add_(MIDDLE)
        return round_clamp_(steps, 0, LEVELS - 1, None if noise is None else self._groups(noise))

    def _values(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 codes [n, K/g, g], overwritten -> [n, K]: one rounding for the product, one for the sum."""
        return codes.sub_(MIDDLE).mul_(_spread(params["scale"])).add_(_spread(params["zero"])).flatten(1)


def _spread(by_group: Tensor) -> Tensor:
    """[K/g, n] -> float32 [n, K/g, 1], which broadcasts over groups."""
    return by_group.t().float().contiguous().unsqueeze(-1)
