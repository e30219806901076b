"""The named op scaled_mm_nvfp4: see `scaled_mm_blocks`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import scaled_mm_blocks
from lowbit.dispatch import kernel


def refuses(
    a: Tensor, b: Tensor, tensor_scale_a: Tensor, tensor_scale_b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, alpha: Tensor | None,
) -> str | None:  # fmt: skip
    """Why this call cannot run here, or None."""
    return scaled_mm_blocks.refuses(
        a, out_dtype, bias, b=b, tensor_scale_a=tensor_scale_a, tensor_scale_b=tensor_scale_b,
        block_scale_a=block_scale_a, block_scale_b=block_scale_b, alpha=alpha,
    )  # fmt: skip


@kernel("scaled_mm_nvfp4", backend="triton", refuses=refuses)
def scaled_mm_nvfp4(
    a: Tensor, b: Tensor, tensor_scale_a: Tensor, tensor_scale_b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, alpha: Tensor | None,
) -> Tensor:  # fmt: skip
    """codes [M, K / 2] and [N, K / 2], swizzled scales -> [M, N]."""
    factor = tensor_scale_a.float().reshape(()) * tensor_scale_b.float().reshape(()) if alpha is None else alpha.float()
    return scaled_mm_blocks.product(a, b, block_scale_a, block_scale_b, factor.reshape(()), bias, out_dtype, fp4=True)
