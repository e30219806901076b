"""linear for w4a8_codebook: exact products of the int8 that codes stand for with rotated activations of 8 bits."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.codebook_rows import Coded
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook

# Up to how many tokens bytes are multiplied rather than pairs of int16: taken over from linear_int8, whose products
# these are.
_FEW_BYTES = 40
_MOST_COLUMNS = (1 << 17) - 1  # more could overflow an int32


def refuses(fmt: W4A8Codebook, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.correction:
        return "a correction of groups, which leaves no integer product"
    k = x.shape[-1]
    if not k or k > _MOST_COLUMNS:
        return f"{k} columns; the kernel takes 1 to {_MOST_COLUMNS}, as sums of more could overflow an int32"
    return refuses_input(fmt, x, parts, bias)


@kernel("linear", format="w4a8_codebook", backend="cpu", refuses=refuses, tolerance=3e-3)
def linear_w4a8_codebook(fmt: W4A8Codebook, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] or None -> [..., N] in the dtype of x.

    The integers and their sums are those of the reference; the rotation of x sums in another order than a matrix
    product, so that a code of the activations may be the next one where its value lies between the two.
    """
    weight = Coded(fmt, parts)
    operands = Operands(x, weight.n, bias)
    native.module().linear_w4a8_codebook(
        *operands.rows, *weight.fields, fmt.rotation, *operands.bias_out, _FEW_BYTES, native.threads()
    )
    return operands.out
