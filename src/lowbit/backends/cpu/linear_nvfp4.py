"""linear for nvfp4 in the layout rows16: the codes stay 4 bits until they are multiplied."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.e2m1_ways import integer_block, way
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.nvfp4 import GROUP, Nvfp4
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16


@kernel("linear", format="nvfp4", backend="cpu", layout=rows16.NAME, refuses=refuses_input, tolerance=6e-3)
def linear_nvfp4(fmt: Nvfp4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    words, operands = parts["qdata"], Operands(x, rows16.rows(fmt, parts), bias)
    native.module().linear_nvfp4(
        *operands.rows, words.data_ptr(), words.shape[1], parts["scale"].data_ptr(), parts["global_scale"].data_ptr(),
        fmt.row_global_scale, fmt.global_scale_divides, integer_block(operands.k), *operands.bias_out,
        way(x, operands.m, GROUP), native.threads(),
    )  # fmt: skip
    return operands.out
