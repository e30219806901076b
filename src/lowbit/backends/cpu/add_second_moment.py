"""add_second_moment by products of int16, where the processor multiplies pairs of them in one step.

Each column is rounded to 13 bits, in units of its largest value of 128 rows: an error of at most 1/8190 of that value,
no larger than that of bfloat16 for values near it. The sum of the rounded rows is exact but for one rounding to float32
every 128 rows, so it is positive semidefinite as far as one of float32 products is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.dispatch import kernel

FAST = ("avx512", "amx")  # sets that multiply pairs of int16 and add them up in one instruction


def refuses(total: Tensor, x: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if not native.isa().startswith(FAST):
        return f"{native.isa()} multiplies float32 as fast as pairs of int16"
    if total.dtype != torch.float32 or x.dtype != torch.float32:
        return "not everything is float32"
    if not total.is_contiguous() or not x.is_contiguous():
        return "not all rows are without gaps"
    return None


@kernel("add_second_moment", backend="cpu", refuses=refuses, tolerance=2e-4)
def add_second_moment(total: Tensor, x: Tensor) -> None:
    """See `lowbit.ops.second_moment`."""
    native.module().add_second_moment(total.data_ptr(), x.data_ptr(), *x.shape, native.threads())
