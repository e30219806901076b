"""convrot_w4a4: signed 4-bit codes of the rotated weight, one scale a row, times 4-bit activations (arXiv 2512.03673).

    w = R (code * scale)          code: [-7, 7]; R turns groups of `rotation` columns by the regular Hadamard matrix
    y = deq(quant(R x)) deq(code * scale)^T + bias

part     shape      meaning
qdata    [N, K/2]   int8 bytes, the even column in the low nibble, two's complement
scale    [N]        float32, absmax of the rotated row / 7, at least 1e-8

rotation       a power of four that divides K. 0 leaves weight and activations as they are.
linear_dtype   what each row of the rotated input is quantized to on the fly: "int4" by absmax / 7, "int8" by
               absmax / 127 (the same weight with less noise of the input; comfy-kitchen's CUDA backend does that, its
               eager one reads "int8" and uses 4 bits). Integer products are exact.

One scale serves all columns of a row, so the integer product needs none within its sum; the rotation is what makes
that bearable. With rotation 0 or a scale [N, 1] files call it int4_tensorwise.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> parts = parse_spec("convrot_w4a4(rotation=0)").quantize(torch.tensor([[0.7, -0.3], [0.0, 0.0]]))
>>> parts["qdata"].tolist(), parts["scale"].shape
([[-41], [0]], torch.Size([2]))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.formats.base import MIN_SCALE, Candidate, Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, N, Part, Parts
from lowbit.formats.registry import one_of, register
from lowbit.formats.stored_steps import FloatSteps
from lowbit.numerics.floats import divisor
from lowbit.numerics.int4_matmul import unpack_codes
from lowbit.numerics.int8_matmul import INT8_MAX, coded_linear
from lowbit.numerics.integers import round_clamp_
from lowbit.numerics.levels import IntegerLevels
from lowbit.numerics.packing import pack_nibbles
from lowbit.numerics.rotations import REGULAR_SIZES, rotate_groups

LARGEST = 7
KERNEL_COLUMNS = 64  # comfy-kitchen refuses another K, whatever the rotation
_LEVELS = IntegerLevels(-LARGEST, LARGEST)
# Times absmax / 7. A rotated row is nearly Gaussian and long, so that its peak lies far out: clipping pays at once.
_FACTORS = (0.75, 0.7, 0.8, 0.65, 0.85, 0.6, 0.725, 0.775, 0.675, 0.9, 0.55)


@register
@dataclass(frozen=True)
class ConvrotW4A4(Format):
    """Rotated int4 weights with a scale a row, and activations rounded to 4 (or 8) bits: 4 bits a weight."""

    rotation: int = 256
    linear_dtype: str = "int4"

    name: ClassVar[str] = "convrot_w4a4"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {"comfy": {"qdata": "weight", "scale": "weight_scale"}}
    golden_sqnr: ClassVar = {
        "convrot_w4a4": 16.95,
        "convrot_w4a4(rotation=0)": 16.9,
        "convrot_w4a4(rotation=64,linear_dtype=int8)": 16.9,
    }
    data_free_solver: ClassVar[str] = "scale_search"
    factors: ClassVar[tuple[float, ...]] = _FACTORS

    def __post_init__(self) -> None:
        one_of(self, "rotation", (0, *REGULAR_SIZES))
        one_of(self, "linear_dtype", ("int4", "int8"))

    def part_rules(self) -> tuple[Part, ...]:
        return Part("qdata", (N, Dim("K", 2)), (torch.int8,)), Part("scale", (N,), (torch.float32,))

    def check_shape(self, n: int, k: int) -> str | None:
        if self.rotation and k % max(self.rotation, KERNEL_COLUMNS):
            return f"has {k} columns, not a multiple of {max(self.rotation, KERNEL_COLUMNS)}"
        return f"has {k} columns; two codes share a byte, so their number must be even" if k % 2 else None

    def prepare(self, rows: Tensor) -> Tensor:
        return rotate_groups(rows, self.rotation) if self.rotation else rows

    def restore(self, rows: Tensor) -> Tensor:
        return self.prepare(rows)  # the rotation is its own inverse

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        scale = (rows.abs().amax(dim=1) / divisor(LARGEST, rows)).clamp_min(MIN_SCALE)
        if not bool(torch.isfinite(scale).all()):
            raise WeightError("weight: its rotated values exceed float32; repair the source or keep this layer")
        return {"scale": scale}

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        return self._steps(rows, params, noise).to(torch.int8)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        return codes.float().mul_(params["scale"].unsqueeze(1))

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes).view(torch.int8)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        return unpack_codes(qdata, unsigned=False)

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        return self._steps(rows, params).mul_(params["scale"].unsqueeze(1))

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, shape[1]

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """Smaller scales: a clipped peak costs less than coarser steps for all the others."""
        for factor in self.factors:
            yield Candidate({"scale": (params["scale"] * factor).clamp_min(MIN_SCALE)})

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        step = params["scale"].reshape(1, -1).clone()
        return Grid(rows.t().contiguous(), step, _LEVELS, columns=rows.shape[1], snap=FloatSteps(MIN_SCALE))

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        return {"scale": grid.step.reshape(-1).clone()}

    @property
    def rounds_input(self) -> bool:
        """Always."""
        return True

    def linear(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x; every row of the rotated input is quantized on its own."""
        qdata, largest = parts["qdata"], LARGEST if self.linear_dtype == "int4" else INT8_MAX
        return coded_linear(
            x, lambda a, b: unpack_codes(qdata[a:b], unsigned=False), parts["scale"], bias, self.rotation, largest
        )

    def _steps(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """The codes of rows as float32."""
        return round_clamp_(rows / params["scale"].unsqueeze(1), -LARGEST, LARGEST, noise)
