"""add_second_moment on AVX-512: one product of tiles right of the diagonal, on columns that are packed once.

PyTorch's products of panels reach half of what the processor multiplies, this one up to 86 % on data in its caches.
Rows of bfloat16, as a model in bfloat16 has them, are multiplied as they are where the processor is fast at it, which
is 1.9 times as fast (Zen 4); elsewhere they are made float32, and the products are as exact.
Products of float32 inputs rounded to 13 bits, two in one instruction, were another 1.6 times as fast; but then the
statistics are no longer those of float32, which calibration promises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.dispatch import kernel

MEASURED = ("avx512", "amx")  # sets that it was faster on


def refuses(total: Tensor, x: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if not native.isa().startswith(MEASURED):
        return f"only measured to be faster than PyTorch's products with AVX-512, and this is {native.isa()}"
    if total.dtype != torch.float32 or x.dtype not in (torch.float32, torch.bfloat16):
        return "the sum is not float32, or the rows are neither float32 nor bfloat16"
    if not total.is_contiguous() or not x.is_contiguous():
        return "not all rows are without gaps"
    return None


@kernel("add_second_moment", backend="cpu", refuses=refuses, tolerance=1e-6)
def add_second_moment(total: Tensor, x: Tensor) -> None:
    """See `lowbit.ops.second_moment`."""
    module = native.module()
    if x.dtype == torch.bfloat16 and native.bf16_dots():
        module.add_second_moment_bf16(total.data_ptr(), x.data_ptr(), *x.shape, native.threads())
        return
    x = x.float()
    module.add_second_moment(total.data_ptr(), x.data_ptr(), *x.shape, native.threads())
