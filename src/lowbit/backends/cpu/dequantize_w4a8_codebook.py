"""dequantize for w4a8_codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import codebook_rows
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook


def refuses(fmt: W4A8Codebook, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return codebook_rows.refuses(dtype, shape[1])


@kernel("dequantize", format="w4a8_codebook", backend="cpu", refuses=refuses, tolerance=1e-6)
def dequantize_w4a8_codebook(fmt: W4A8Codebook, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`.

    Before the rotation every value is the reference's; the rotation sums in another order than a matrix product.
    """
    return codebook_rows.decode(fmt, parts, shape[1], dtype, None, shape)
