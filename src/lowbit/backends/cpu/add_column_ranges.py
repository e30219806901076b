"""add_column_ranges in one pass over the rows, where PyTorch takes four."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, refuses_unlike
from lowbit.dispatch import kernel
from lowbit.ops.column_ranges import BINS

_DTYPES = (torch.float32, torch.bfloat16)  # of x


def refuses(x: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor, magnitudes: Tensor, step: int) -> str | None:
    """Why this call cannot run here, or None."""
    if x.dim() != 2 or not len(x) or step < 1:
        return f"every {step}th of rows {list(x.shape)}; the kernel takes a matrix of at least one row"
    if not all(tensor.is_contiguous() for tensor in (x, total, minimum, maximum, magnitudes)):
        return "not all tensors are without gaps"
    return (
        refuses_unlike(x.shape, x.dtype if x.dtype in _DTYPES else torch.float32, x=x)
        or refuses_unlike(x.shape[1:], torch.float64, total=total)
        or refuses_unlike(x.shape[1:], minimum=minimum, maximum=maximum)
        or refuses_unlike((BINS,), torch.int64, magnitudes=magnitudes)
    )


@kernel("add_column_ranges", backend="cpu", refuses=refuses, tolerance=1e-6)
def add_column_ranges(
    x: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor, magnitudes: Tensor, step: int
) -> None:
    """See `lowbit.ops.column_ranges`."""
    native.module().add_column_ranges(
        x.data_ptr(), DTYPES[x.dtype], *x.shape, total.data_ptr(), minimum.data_ptr(), maximum.data_ptr(),
        magnitudes.data_ptr(), step, native.threads(),
    )  # fmt: skip
