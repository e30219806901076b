"""linear for convrot_w4a4 in the layout rows16: exact products of 4-bit codes with rotated activations of 4 or 8."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.convrot_w4a4 import LARGEST, ConvrotW4A4
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16
from lowbit.numerics.int8_matmul import INT8_MAX

_MOST_COLUMNS = 1 << 20  # of products up to 15 * 127, which an int32 then holds


def refuses(fmt: ConvrotW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if x.shape[-1] > _MOST_COLUMNS:
        return f"{x.shape[-1]} columns; sums of more than {_MOST_COLUMNS} products could overflow an int32"
    return refuses_input(fmt, x, parts, bias)


@kernel("linear", format="convrot_w4a4", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=3e-3)
def linear_convrot_w4a4(fmt: ConvrotW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x.

    Without a rotation the result is the reference's, bit for bit; a rotation sums in another order than a matrix
    product does, so that a code of the activations may be the next one where its value lies between the two.
    """
    words, operands = parts["qdata"], Operands(x, rows16.rows(fmt, parts), bias)
    native.module().linear_convrot_w4a4(
        *operands.rows, words.data_ptr(), words.shape[1], parts["scale"].data_ptr(), fmt.rotation,
        LARGEST if fmt.linear_dtype == "int4" else INT8_MAX, *operands.bias_out, native.threads(),
    )  # fmt: skip
    return operands.out
