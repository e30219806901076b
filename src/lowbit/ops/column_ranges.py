"""What calibration keeps of rows beside their products, by the kernels of the tensors' device."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import ANY_FORMAT, select

BINS = 4096  # 12 of the 31 bits of |x| as float32: 8 of exponent, 4 of mantissa


def add_column_ranges(
    x: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor, magnitudes: Tensor, step: int
) -> None:
    """Take in finite rows, in place. A function and not an operator: never traced.

    x            float32 [R, K]   or bfloat16, at least one row
    total        float64 [K]      the sum of each column
    minimum      float32 [K]      the least of each column
    maximum      float32 [K]      the largest
    magnitudes   int64 [BINS]     how many of |x| begin with these 12 bits, counted in every step-th row, from the first
    """
    args = (x, total, minimum, maximum, magnitudes, step)
    select("add_column_ranges", ANY_FORMAT, "", x.device.type, args).run(*args)
