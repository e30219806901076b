"""linear for mxfp8 in the layout rows16: the codes stay bytes until they are multiplied."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.linear_fp8 import way
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.e8m0_scales import GROUP
from lowbit.formats.mxfp8 import Mxfp8
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16


@kernel("linear", format="mxfp8", backend="cpu", layout=rows16.NAME, refuses=refuses_input, tolerance=6e-3)
def linear_mxfp8(fmt: Mxfp8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    codes, operands = parts["qdata"], Operands(x, rows16.rows(fmt, parts), bias)
    native.module().linear_mxfp8(
        *operands.rows, codes.data_ptr(), codes.shape[1] * 4, parts["scale"].data_ptr(), *operands.bias_out,
        way(x, operands.m, GROUP), native.threads(),
    )  # fmt: skip
    return operands.out
