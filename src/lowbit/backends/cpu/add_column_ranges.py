"""add_column_ranges in one pass over the rows, where PyTorch takes four."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.dispatch import kernel


def refuses(x: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor, magnitudes: Tensor, step: int) -> str | None:
    """Why this call cannot run here, or None."""
    if x.dtype != torch.float32:
        return f"the rows are {str(x.dtype).removeprefix('torch.')}; the kernel takes float32"
    if not all(tensor.is_contiguous() for tensor in (x, total, minimum, maximum, magnitudes)):
        return "not all tensors are without gaps"
    return None


@kernel("add_column_ranges", backend="cpu", refuses=refuses, tolerance=1e-6)
def add_column_ranges(
    x: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor, magnitudes: Tensor, step: int
) -> None:
    """See `lowbit.ops.column_ranges`."""
    native.module().add_column_ranges(
        x.data_ptr(), *x.shape, total.data_ptr(), minimum.data_ptr(), maximum.data_ptr(), magnitudes.data_ptr(), step,
        native.threads(),
    )  # fmt: skip
