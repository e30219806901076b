"""The named op scaled_mm_mxfp8: see `scaled_mm_blocks`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import scaled_mm_blocks
from lowbit.dispatch import kernel


def refuses(
    a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> str | None:
    """Why this call cannot run here, or None."""
    return scaled_mm_blocks.refuses(a, out_dtype, bias, b=b, block_scale_a=block_scale_a, block_scale_b=block_scale_b)


@kernel("scaled_mm_mxfp8", backend="triton", refuses=refuses)
def scaled_mm_mxfp8(
    a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """codes [M, K] and [N, K], swizzled scales -> [M, N]."""
    return scaled_mm_blocks.product(a, b, block_scale_a, block_scale_b, None, bias, out_dtype, fp4=False)
