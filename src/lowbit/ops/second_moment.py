"""Sums of x x^T over rows, which is what calibration spends its own time on, by the kernels of the tensors' device."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import ANY_FORMAT, select


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """Add x^T x of rows x to the upper triangle of a sum, in place. A function and not an operator: never traced.

    total   float32 [K, K]   what lies below its diagonal may be written over, with no meaning
    x       float32 or bfloat16 [R, K]
    """
    args = (total, x)
    select("add_second_moment", ANY_FORMAT, "", x.device.type, args).run(*args)
