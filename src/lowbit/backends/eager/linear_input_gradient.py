"""The gradient of a linear's input, for every format: grad [..., N] times the effective weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.base import DECODE_ELEMENTS, Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks
from lowbit.ops.encode import decode_rows


@kernel("linear_input_gradient", backend="eager", layout=ANY_LAYOUT)
@kernel("linear_input_gradient", backend="eager")
def linear_input_gradient(fmt: Format, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad; several pieces of the weight are summed in float32."""
    return in_pieces(grad, k, fmt.row_multiple, lambda start, stop: decode_rows(fmt, parts, k, start, stop, grad.dtype))


def in_pieces(grad: Tensor, k: int, multiple: int, decode: Callable[[int, int], Tensor]) -> Tensor:
    """grad [..., N] times a weight [N, k], of which `decode(start, stop)` gives rows in the dtype of grad.

    multiple: of so many rows is every piece but the last. One that is not all is summed in float32.
    """
    n = grad.shape[-1]
    pieces = list(row_chunks(n, k, multiple, DECODE_ELEMENTS))
    if len(pieces) == 1:
        return grad @ decode(0, n)
    total = grad.new_zeros((*grad.shape[:-1], k), dtype=grad.float().dtype)
    for start, stop in pieces:
        total += grad[..., start:stop] @ decode(start, stop)
    return total.to(grad.dtype)
