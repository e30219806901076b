"""dequantize for gguf: every value is ggml's, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import gguf_rows
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts import gguf_rows16


def refuses(fmt: GgufBlock, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return gguf_rows.refuses(fmt, dtype, shape[1])


@kernel("dequantize", format="gguf", backend="cpu", refuses=refuses)
def dequantize_gguf(fmt: GgufBlock, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    return gguf_rows.decode(fmt, parts, shape[1], dtype, None, shape)


@kernel("dequantize", format="gguf", backend="cpu", layout=gguf_rows16.NAME, refuses=refuses)
def dequantize_gguf_rows16(fmt: GgufBlock, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts in gguf_rows16 -> the effective weight [N, K] in `dtype`."""
    return gguf_rows.decode(fmt, parts, shape[1], dtype, None, shape, packed=True)
