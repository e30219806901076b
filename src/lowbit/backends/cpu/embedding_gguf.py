"""embedding for gguf: only the rows that are asked for, sixteen at a time, of plain blocks or out of gguf_rows16."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import gguf_rows
from lowbit.backends.cpu.operands import check_found
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts import gguf_rows16


def refuses(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    if indices.dtype not in {torch.int64, torch.int32}:
        return f"indices are {str(indices.dtype).removeprefix('torch.')}; the kernel takes int64 and int32"
    return gguf_rows.refuses(fmt, dtype, k)


@kernel("embedding", format="gguf", backend="cpu", refuses=refuses)
def embedding_gguf(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    return gguf_rows.decode(fmt, parts, k, dtype, indices, (*indices.shape, k))


@kernel("embedding", format="gguf", backend="cpu", layout=gguf_rows16.NAME, refuses=refuses)
def embedding_gguf_rows16(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...], parts in gguf_rows16 -> [..., K] in `dtype`: of a table that is tied to a head."""
    named, n = indices.reshape(-1), gguf_rows16.rows(fmt, parts)
    outside = (named < 0) | (named >= n)
    check_found(named, int(outside.nonzero()[0]) if outside.any() else -1, n)
    rows = {**parts, "qdata": gguf_rows16.look_up(fmt, parts["qdata"], named)}
    return gguf_rows.decode(fmt, rows, k, dtype, None, (*indices.shape, k))
