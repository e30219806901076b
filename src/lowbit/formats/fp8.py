"""fp8_e4m3, fp8_e5m2: one byte a weight, a floating-point code times a float32 scale.

    w = code * scale            code: float8_e4m3fn (max 448) or float8_e5m2 (max 57344)

granularity   scale                                  shared by
tensor        []                                     the whole weight
row           [N, 1]                                 one output row
block         [ceil(N / rows), ceil(K / columns)]    a tile of `block_size`, smaller at the edges

The scale is `amax / max`, at least 1e-8. The mantissa of three (two) bits caps e4m3 (e5m2) at about 31.5 (25.5) dB
whatever the scale; a finer granularity helps where magnitudes differ by more than the exponent covers.

activations   of fp8_e4m3. "fp8": a linear rounds its input on the fly to float8_e4m3fn codes times absmax / 448 of each
              row (with granularity block, of each block of columns of each row: 1 x 128 against 128 x 128), and
              multiplies codes, as W8A8 runtimes do. "none": it decodes the weight.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("fp8_e4m3(granularity=row)")
>>> parts = fmt.quantize(torch.tensor([[1.0, -448.0], [0.5, 0.25]]))
>>> parts["scale"].shape
torch.Size([2, 1])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.formats.granular import Granular
from lowbit.formats.parts import Parts
from lowbit.formats.registry import one_of, register
from lowbit.numerics.floats import fp8_max, from_fp8, stochastic_to_fp8, to_fp8
from lowbit.numerics.fp8_matmul import fp8_linear, fp8_linear_blocks
from lowbit.numerics.levels import E4M3, E5M2

# Scales below amax / max trade a clipped peak for finer steps; above it, the exponent grid shifts against the weights.
# Powers of two leave a floating-point grid as it is, so one octave is enough.
_FACTORS = tuple(2.0 ** (i / 8) for i in range(-4, 5) if i)


@dataclass(frozen=True)
class _Fp8(Granular):
    factors: ClassVar[tuple[float, ...]] = _FACTORS

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        scaled = rows / self._spread(params["scale"], rows.shape)
        return to_fp8(scaled, self.dtype) if noise is None else stochastic_to_fp8(scaled, self.dtype, noise)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        return from_fp8(codes).mul_(self._spread(params["scale"], codes.shape))


@register
@dataclass(frozen=True)
class Fp8E4M3(_Fp8):
    """float8_e4m3fn codes: three mantissa bits, the weight format of ComfyUI, vLLM and most fp8 hardware."""

    activations: str = "none"

    name: ClassVar[str] = "fp8_e4m3"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    largest: ClassVar[float] = fp8_max(torch.float8_e4m3fn)
    largest_activation: ClassVar[float] = largest
    levels: ClassVar = E4M3
    golden_sqnr: ClassVar = {
        "fp8_e4m3": 31.55,
        "fp8_e4m3(granularity=row)": 31.56,
        "fp8_e4m3(granularity=block)": 31.56,
        "fp8_e4m3(granularity=row,activations=fp8)": 31.56,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "activations", ("none", "fp8"))

    @property
    def rounds_input(self) -> bool:
        """With `activations=fp8`."""
        return self.activations != "none"

    def linear(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if self.activations == "none":
            return super().linear(x, parts, bias)
        if self.granularity == "block":
            return fp8_linear_blocks(x, parts["qdata"], parts["scale"], self.block_size, bias, x.dtype)
        return fp8_linear(x, parts["qdata"], parts["scale"], bias, x.dtype)


@register
@dataclass(frozen=True)
class Fp8E5M2(_Fp8):
    """float8_e5m2 codes: two mantissa bits and a range of 2**32; about 6 dB worse than e4m3 on weights."""

    name: ClassVar[str] = "fp8_e5m2"
    dtype: ClassVar[torch.dtype] = torch.float8_e5m2
    largest: ClassVar[float] = fp8_max(torch.float8_e5m2)
    largest_activation: ClassVar[float] = largest
    levels: ClassVar = E5M2
    golden_sqnr: ClassVar = {
        "fp8_e5m2": 25.58,
        "fp8_e5m2(granularity=row)": 25.58,
        "fp8_e5m2(granularity=block)": 25.58,
    }
