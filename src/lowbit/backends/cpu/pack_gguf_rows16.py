"""pack and unpack for the layout gguf_rows16: the words of 16 rows interleaved natively."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.backends.cpu.gguf_rows import TYPES
from lowbit.backends.cpu.pack_rows16 import threads
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts import gguf_rows16


@kernel("pack", backend="cpu", layout=gguf_rows16.NAME)
def pack_gguf_rows16(fmt: GgufBlock, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """Plain parts -> gguf_rows16."""
    return gguf_rows16.pack(fmt, parts, _interleave)


@kernel("unpack", backend="cpu", layout=gguf_rows16.NAME)
def unpack_gguf_rows16(fmt: GgufBlock, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """The inverse of pack_gguf_rows16."""
    return gguf_rows16.unpack(fmt, parts, _separate)


def _interleave(fmt: GgufBlock, codes: Tensor) -> Tensor:
    codes = codes.contiguous()
    n, size = codes.shape
    made = memory.empty(gguf_rows16.packed_shape(n, size), torch.int32)
    native.module().interleave_gguf(
        TYPES.index(fmt.type), codes.data_ptr(), n, size, made.data_ptr(), made.stride(0) * 4, threads()
    )
    return made


def _separate(fmt: GgufBlock, packed: Tensor, n: int, size: int) -> Tensor:
    made, source = memory.empty((n, size), torch.uint8), packed.contiguous()
    native.module().separate_gguf(
        TYPES.index(fmt.type), source.data_ptr(), source.stride(0) * 4, made.data_ptr(), n, size, threads()
    )
    return made
