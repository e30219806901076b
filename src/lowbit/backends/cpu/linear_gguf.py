"""linear for gguf, of blocks as they lie in the file or in the layout gguf_rows16; none is decoded as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.e2m1_ways import integer_block
from lowbit.backends.cpu.gguf_rows import Blocks, refuses_type
from lowbit.backends.cpu.operands import Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts import gguf_rows16

TOLERANCE = 6e-3


def refuses(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if not x.shape[-1]:
        return "no columns; the kernel takes whole blocks"
    return refuses_type(fmt) or refuses_input(fmt, x, parts, bias)


@kernel("linear", format="gguf", backend="cpu", refuses=refuses, tolerance=TOLERANCE)
def linear_gguf(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] or None -> [..., N] in the dtype of x.

    Activations of 16 bits become integers of 16 bits with a scale for up to 128 columns, which is more exact than
    they are themselves; sums are float32.
    """
    return _multiply(fmt, x, parts, bias, packed=False)


@kernel("linear", format="gguf", backend="cpu", layout=gguf_rows16.NAME, refuses=refuses, tolerance=TOLERANCE)
def linear_gguf_rows16(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same, bit for bit, of parts in gguf_rows16. Nothing is gathered: two thirds of the time for few tokens."""
    return _multiply(fmt, x, parts, bias, packed=True)


def _multiply(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None, *, packed: bool) -> Tensor:
    blocks = Blocks(fmt, parts, packed=packed)
    operands = Operands(x, blocks.n, bias)
    shared = 0 if x.dtype == torch.float32 else integer_block(operands.k)
    native.module().linear_gguf(
        *operands.rows, *blocks.place, blocks.scale, shared, *operands.bias_out, native.threads()
    )
    return operands.out
