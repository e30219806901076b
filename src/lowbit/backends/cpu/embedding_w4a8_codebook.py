"""embedding for w4a8_codebook: only the rows that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import codebook_rows
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook


def refuses(fmt: W4A8Codebook, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    if indices.dtype not in {torch.int64, torch.int32}:
        return f"indices are {str(indices.dtype).removeprefix('torch.')}; the kernel takes int64 and int32"
    return codebook_rows.refuses(dtype, k)


@kernel("embedding", format="w4a8_codebook", backend="cpu", refuses=refuses, tolerance=1e-6)
def embedding_w4a8_codebook(fmt: W4A8Codebook, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    return codebook_rows.decode(fmt, parts, k, dtype, indices, (*indices.shape, k))
