"""embedding for gguf: only the rows that are asked for, sixteen at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import gguf_rows
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts


def refuses(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    if indices.dtype not in {torch.int64, torch.int32}:
        return f"indices are {str(indices.dtype).removeprefix('torch.')}; the kernel takes int64 and int32"
    return gguf_rows.refuses(fmt, dtype, k)


@kernel("embedding", format="gguf", backend="cpu", refuses=refuses)
def embedding_gguf(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    return gguf_rows.decode(fmt, parts, k, dtype, indices, (*indices.shape, k))
