"""linear for fp8_e4m3 and fp8_e5m2 in the layout rows16: the codes stay bytes until they are multiplied."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.fp8 import Fp8E4M3, Fp8E5M2
from lowbit.formats.granular import GRANULARITIES
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

# Up to how many tokens decoding in registers is faster than panels, measured: on AVX2 the two are equal from 8 to 16;
# with AVX-512 a tile of registers holds 16 tokens, and more want a second pass. Not measured on other sets.
_FEW = {"avx512": 16, "amx": 16}
_FEW_ELSEWHERE = 8
_COLUMNS = 4  # a vector load of codes takes as many


def few(m: int) -> bool:
    """Whether m tokens go by registers rather than by panels; mxfp8 has the same codes and asks, too."""
    return m <= _FEW.get(native.isa(), _FEW_ELSEWHERE)


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
        GRANULARITIES.index(fmt.granularity), *tile, *operands.bias_out, few(operands.m), native.threads(),
    )  # fmt: skip
    return operands.out
