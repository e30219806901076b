"""linear for fp8_e4m3 and fp8_e5m2 in the layout rows16: the codes stay bytes until they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.fp8 import Fp8E4M3, Fp8E5M2
from lowbit.formats.granular import GRANULARITIES
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

REGISTERS, PANELS, PAIRS = range(3)  # enum class Fp8Way
# Up to how many tokens decoding in registers is faster than panels, measured: on AVX2 the two are equal from 8 to 16;
# with AVX-512 a tile of registers holds 16 tokens, and more want a second pass. Not measured on other sets.
_FEW = {"avx512": 16, "amx": 16}
_FEW_ELSEWHERE = 8
# The same of pairs of bfloat16, measured on Zen 4: for 6 tokens the two are equal, for 8 pairs are 4 to 6 % faster.
_FEW_PAIRED = 6
_LEAST_GROUP = 32  # columns under one scale, whose products are added up before they are multiplied with it
_COLUMNS = 4  # a vector load of codes takes as many


def way(x: Tensor, m: int, group: int) -> int:
    """The fastest way to multiply m tokens in the dtype of x with groups of so many columns; mxfp8 asks, too."""
    if m > _FEW_PAIRED and x.dtype == torch.bfloat16 and group >= _LEAST_GROUP and native.bf16_dots():
        return PAIRS
    return REGISTERS if m <= _FEW.get(native.isa(), _FEW_ELSEWHERE) else PANELS


def refuses(fmt: Fp8E4M3 | Fp8E5M2, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.rounds_input:
        return "rounds its input to fp8; the kernel multiplies activations as they are"
    if fmt.granularity == "block" and fmt.block_size[1] % _COLUMNS:
        return f"tiles of {fmt.block_size[1]} columns; the kernel takes multiples of {_COLUMNS}"
    return refuses_input(fmt, x, parts, bias)


@kernel("linear", format="fp8_e5m2", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=6e-3)
@kernel("linear", format="fp8_e4m3", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=6e-3)
def linear_fp8(fmt: Fp8E4M3 | Fp8E5M2, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    codes, n = parts["qdata"], rows16.rows(fmt, parts)
    operands = Operands(x, n, bias)
    tile = fmt.block_size if fmt.granularity == "block" else (n, operands.k)
    native.module().linear_fp8(
        *operands.rows, codes.data_ptr(), codes.shape[1] * 4, fmt.name == "fp8_e5m2", parts["scale"].data_ptr(),
        GRANULARITIES.index(fmt.granularity), *tile, *operands.bias_out, way(x, operands.m, tile[1]), native.threads(),
    )  # fmt: skip
    return operands.out
