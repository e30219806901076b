"""linear for gguf, of blocks as they lie in the file: nobody has to pack a weight, and none is decoded as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.e2m1_ways import integer_block
from lowbit.backends.cpu.gguf_rows import Blocks, refuses_type
from lowbit.backends.cpu.operands import Operands, address, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts


def refuses(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if not x.shape[-1]:
        return "no columns; the kernel takes whole blocks"
    return refuses_type(fmt) or refuses_input(fmt, x, parts, bias)


@kernel("linear", format="gguf", backend="cpu", refuses=refuses, tolerance=6e-3)
def linear_gguf(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] or None -> [..., N] in the dtype of x.

    Activations of 16 bits become integers of 16 bits with a scale for up to 128 columns, which is more exact than
    they are themselves; sums are float32.
    """
    blocks = Blocks(fmt, parts)
    operands = Operands(x, blocks.n, bias)
    shared = 0 if x.dtype == torch.float32 else integer_block(operands.k)
    native.module().linear_gguf(
        *operands.rows, blocks.type, blocks.codes.data_ptr(), blocks.codes.stride(0), address(blocks.global_scale),
        shared, *operands.bias_out, native.threads(),
    )  # fmt: skip
    return operands.out
