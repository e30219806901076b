"""linear for mxfp4 in the layout rows16: the codes stay 4 bits until they are multiplied."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.e2m1_ways import integer_block, way
from lowbit.backends.cpu.operands import address, dtype_code, output_of, refuses_input, rows_of
from lowbit.dispatch import kernel
from lowbit.formats.e8m0_scales import GROUP
from lowbit.formats.mxfp4 import Mxfp4
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16


@kernel("linear", format="mxfp4", backend="cpu", layout=rows16.NAME, refuses=refuses_input, tolerance=6e-3)
def linear_mxfp4(fmt: Mxfp4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    rows, n = rows_of(x), rows16.rows(fmt, parts)
    out = output_of(x, n)
    m, k = rows.shape
    words = parts["qdata"]
    native.module().linear_mxfp4(
        rows.data_ptr(), dtype_code(x), m, n, k, words.data_ptr(), words.shape[1], parts["scale"].data_ptr(),
        integer_block(k), address(bias), dtype_code(bias), out.data_ptr(), way(x, m, GROUP), native.threads(),
    )  # fmt: skip
    return out
