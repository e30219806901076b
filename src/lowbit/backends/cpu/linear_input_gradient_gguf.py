"""linear_input_gradient for gguf: a bounded piece of the weight is decoded at a time, and PyTorch multiplies."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import gguf_rows
from lowbit.backends.eager.linear_input_gradient import in_pieces
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts import gguf_rows16

TOLERANCE = 6e-3  # the same values, but cut into pieces elsewhere


def refuses(fmt: GgufBlock, grad: Tensor, parts: Parts, k: int) -> str | None:
    """Why this call cannot run here, or None."""
    return gguf_rows.refuses(fmt, grad.dtype, k)


@kernel("linear_input_gradient", format="gguf", backend="cpu", refuses=refuses, tolerance=TOLERANCE)
def linear_input_gradient_gguf(fmt: GgufBlock, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad."""
    return _gradient(fmt, grad, parts, k, packed=False)


@kernel(
    "linear_input_gradient", format="gguf", backend="cpu", layout=gguf_rows16.NAME, refuses=refuses, tolerance=TOLERANCE
)
def linear_input_gradient_gguf_rows16(fmt: GgufBlock, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """The same of parts in gguf_rows16."""
    return _gradient(fmt, grad, parts, k, packed=True)


def _gradient(fmt: GgufBlock, grad: Tensor, parts: Parts, k: int, *, packed: bool) -> Tensor:
    def decode(start: int, stop: int) -> Tensor:
        shape = (stop - start, k)
        return gguf_rows.decode(fmt, parts, k, grad.dtype, None, shape, packed=packed, rows=(start, stop))

    return in_pieces(grad, k, gguf_rows16.ROWS, decode)
