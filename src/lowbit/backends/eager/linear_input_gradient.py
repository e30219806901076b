"""The gradient of a linear's input, for every format: grad [..., N] times the effective weight."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.base import DECODE_ELEMENTS, Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks


@kernel("linear_input_gradient", backend="eager", layout=ANY_LAYOUT)
@kernel("linear_input_gradient", backend="eager")
def linear_input_gradient(fmt: Format, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad; several pieces of the weight are summed in float32."""
    n = grad.shape[-1]
    pieces = list(row_chunks(n, k, fmt.row_multiple, DECODE_ELEMENTS))
    if len(pieces) == 1:
        return grad @ fmt.dequantize_rows(parts, k, 0, n, grad.dtype)
    total = grad.new_zeros((*grad.shape[:-1], k), dtype=grad.float().dtype)
    for start, stop in pieces:
        total += grad[..., start:stop] @ fmt.dequantize_rows(parts, k, start, stop, grad.dtype)
    return total.to(grad.dtype)
