"""Products of block-scaled matrices for the eager backend: bounded pieces are decoded to float32 and multiplied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.formats.base import DECODE_ELEMENTS
from lowbit.numerics.groups import row_chunks

Rows = Callable[[int, int], Tensor]
"""Rows [start, stop) of an operand, decoded to float32."""


def product(
    a: Rows, b: Rows, sizes: tuple[int, int, int], alpha: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a [M, K], b [N, K] -> a b^T * alpha + bias in `dtype`: [M, N], `sizes` being (M, N, K).

    Sums are float32 whatever the result, alpha and bias are applied to them, and the result is cast once.
    """
    m, n, k = sizes
    pieces = []
    for start, stop in row_chunks(m, k, elements=DECODE_ELEMENTS):
        left = a(start, stop)
        out = torch.empty((stop - start, n), dtype=dtype, device=left.device)
        for first, last in row_chunks(n, k, elements=DECODE_ELEMENTS):
            sums = left @ b(first, last).T
            if alpha is not None:
                sums *= alpha
            if bias is not None:
                sums += bias[first:last].float()
            out[:, first:last] = sums
        pieces.append(out)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
