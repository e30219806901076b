"""What fp8 and int8 share: one byte a weight, a code times a float32 scale of the tensor, of each row or of each block.

    w = code * scale            scale = amax / largest code, at least 1e-8

granularity   scale                                  shared by
tensor        []                                     the whole weight
row           [N, 1]                                 one output row
block         [ceil(N / rows), ceil(K / columns)]    a tile of `block_size`, smaller at the edges
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats.base import MIN_SCALE, Candidate, Format, whole_amax
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, K, N, Part, Parts
from lowbit.formats.registry import one_of
from lowbit.formats.stored_steps import FloatSteps
from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import expand_tiles, is_tile, reduce_tiles
from lowbit.numerics.levels import Levels

GRANULARITIES = ("tensor", "row", "block")


@dataclass(frozen=True)
class Granular(Format):
    """A subclass states `dtype`, `largest` and `levels` of its codes, `factors` worth trying, `encode` and `decode`."""

    granularity: str = "tensor"
    block_size: tuple[int, int] = (128, 128)

    dtype: ClassVar[torch.dtype]
    largest: ClassVar[float]
    """The largest code."""
    levels: ClassVar[Levels]
    factors: ClassVar[tuple[float, ...]]
    """What the fitted scale may be multiplied by, most promising first."""
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {"comfy": {"qdata": "weight", "scale": "weight_scale"}}

    def __post_init__(self) -> None:
        one_of(self, "granularity", GRANULARITIES)
        if not is_tile(self.block_size):
            raise FormatError(
                f"{self.name}: block_size is {self.block_size!r}, expected rows x columns such as 128x128"
            )

    def part_rules(self) -> tuple[Part, ...]:
        rows, columns = self.block_size
        dims = {"tensor": (), "row": (N, 1), "block": (Dim("N", rows), Dim("K", columns))}[self.granularity]
        return Part("qdata", (N, K), (self.dtype,)), Part("scale", dims, (torch.float32,))

    def fit_shared(self, w: Tensor) -> Parts:
        return {"scale": self._scale(whole_amax(w))} if self.granularity == "tensor" else {}

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        if shared:
            return shared
        magnitude = rows.abs()
        if self.granularity == "row":
            return {"scale": self._scale(magnitude.amax(dim=1, keepdim=True))}
        return {"scale": self._scale(reduce_tiles(magnitude, self.block_size, "amax"))}

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return {"tensor": shape, "row": (1, shape[1]), "block": self.block_size}[self.granularity]

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        for factor in self.factors:
            yield Candidate({"scale": (params["scale"] * factor).clamp_min(MIN_SCALE)})

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        n, k = rows.shape
        tall, wide = self.unit((n, k))
        by_row = params["scale"].reshape(-1, params["scale"].shape[-1] if self.granularity == "block" else 1)
        step = by_row.t().repeat_interleave(tall, dim=1)[:, :n].contiguous()
        return Grid(rows.t().contiguous(), step, self.levels, columns=wide, rows=tall, snap=FloatSteps(MIN_SCALE))

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        by_tile = grid.step[:, :: grid.rows].t()
        scale = by_tile.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the stride of a single one
        return {"scale": scale.reshape(()) if self.granularity == "tensor" else scale}

    @property
    def single_rows(self) -> Format:
        return replace(self, block_size=(1, self.block_size[1])) if self.granularity == "block" else self

    def _spread(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """The scale so that it broadcasts over [n, K]."""
        if self.granularity != "block":
            return scale
        return expand_tiles(scale, self.block_size, (shape[0], shape[1]))

    def _scale(self, amax: Tensor) -> Tensor:
        return (amax / divisor(self.largest, amax)).clamp_min(MIN_SCALE)
