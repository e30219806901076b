"""int8: one byte a weight, an integer in [-127, 127] times a float32 scale.

    w = code * scale            scale = absmax / 127, at least 1e-8; code = w / scale, rounded half to even, in float32

granularity   scale                                  shared by
row           [N, 1]                                 one output row
tensor        []                                     the whole weight
block         [ceil(N / rows), ceil(K / columns)]    a tile of `block_size`, smaller at the edges

rotation      a power of four that divides K, with granularity row only: the codes are of the weight whose groups
              along K are rotated by the regular Hadamard matrix (ConvRot, arXiv 2512.03673), which spreads outliers
              over their group. The rotation is orthonormal, so the squared error of a row, the unit of scale, is the
              same in both bases. `lowbit convert` chooses one where only the name "int8" was asked for.
activations   "int8": a linear quantizes each row of its (rotated) input on the fly, by absmax / 127 (with granularity
              block, each block of columns of each row), and multiplies integers exactly. "none": it decodes the weight.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> parts = parse_spec("int8").quantize(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
>>> parts["qdata"].tolist(), parts["scale"].shape
([[127, -50], [0, 0]], torch.Size([2, 1]))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats.granular import Granular
from lowbit.formats.parts import Parts
from lowbit.formats.registry import one_of, register
from lowbit.numerics.int8_matmul import INT8_MAX, int8_linear, int8_linear_blocks
from lowbit.numerics.integers import round_clamp_
from lowbit.numerics.levels import IntegerLevels
from lowbit.numerics.rotations import REGULAR_SIZES, rotate_groups

_LARGEST_GROUP = 256  # of a rotation that `auto` chooses

# A smaller scale clips the peak and gives all other values finer steps: a few percent help a row, half a tensor.
# Close to 1 the gain is in how the grid falls on the few largest weights, so small units want fine steps (+0.2 dB).
_FACTORS = (1.004, 0.996, 0.992, 0.988, 0.984, 0.98, 0.97, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)


@register
@dataclass(frozen=True)
class Int8(Granular):
    """int8 codes times a scale per row, tensor or block; optionally of the rotated weight (see the module)."""

    granularity: str = "row"
    rotation: int = 0
    activations: str = "int8"

    name: ClassVar[str] = "int8"
    dtype: ClassVar[torch.dtype] = torch.int8
    largest: ClassVar[float] = INT8_MAX
    largest_activation: ClassVar[float] = INT8_MAX
    levels: ClassVar = IntegerLevels(-INT8_MAX, INT8_MAX)
    factors: ClassVar[tuple[float, ...]] = _FACTORS
    golden_sqnr: ClassVar = {
        "int8": 42.07,
        "int8(activations=none)": 42.07,
        "int8(granularity=tensor)": 38.96,
        "int8(granularity=block)": 40.5,
        "int8(rotation=16)": 42.08,
        "int8(rotation=64)": 42.06,
        "int8(rotation=256)": 42.12,
        "int8(rotation=1024)": 42.15,
    }

    def rotated_for(self, k: int) -> Int8 | None:
        """In the largest groups that divide K, up to 256: ComfyUI's own, and larger ones gained nothing on MiniLM."""
        fitting = [size for size in REGULAR_SIZES if size <= _LARGEST_GROUP and k % size == 0]
        could = self.granularity == "row" and not self.rotation and self.rounds_input
        return replace(self, rotation=max(fitting)) if could and fitting else None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "rotation", (0, *REGULAR_SIZES))
        one_of(self, "activations", ("int8", "none"))
        if self.rotation and self.granularity != "row":
            raise FormatError(f"{self.name}: rotation goes with granularity=row, not with {self.granularity}")

    def check_shape(self, n: int, k: int) -> str | None:
        if self.rotation and k % self.rotation:
            return f"has {k} columns, not a multiple of the rotation group {self.rotation}"
        return None

    def prepare(self, rows: Tensor) -> Tensor:
        return rotate_groups(rows, self.rotation) if self.rotation else rows

    def restore(self, rows: Tensor) -> Tensor:
        return self.prepare(rows)  # the rotation is its own inverse

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        params = super().fit(rows, shared)
        if self.rotation and not bool(torch.isfinite(params["scale"]).all()):
            raise WeightError("weight: its rotated values exceed float32; repair the source or keep this layer")
        return params

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        return self._steps(rows, params, noise).to(torch.int8)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        return codes.float().mul_(self._spread(params["scale"], codes.shape))

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        return self._steps(rows, params).mul_(self._spread(params["scale"], rows.shape))

    @property
    def rounds_input(self) -> bool:
        """With `activations=int8`."""
        return self.activations != "none"

    def linear(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if self.activations == "none":
            return super().linear(x, parts, bias)
        qdata, scale = parts["qdata"], parts["scale"]
        if self.granularity == "block":
            return int8_linear_blocks(x, qdata, scale, self.block_size, bias, x.dtype)
        return int8_linear(x, qdata, scale, bias, x.dtype, self.rotation)

    def _steps(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """The codes of rows as float32."""
        scaled = rows / self._spread(params["scale"], rows.shape)
        return round_clamp_(scaled, -INT8_MAX, INT8_MAX, noise)
