"""The largest magnitude of each row of a matrix, or of a whole one: a pass over it, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import rounding
from lowbit.backends.triton.tuning import config, tuned

_PIECE = 1 << 16  # values of a whole matrix for one program


@tuned(
    [config(BLOCK=2048, warps=4), config(BLOCK=4096, warps=8), config(BLOCK=4096, warps=4)],
    key=("total", "length", "w"),
)
@triton.jit
def _largest(w, found, total, length, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Program i: the bits of the largest magnitude of w[i * length : (i + 1) * length], w being flat."""
    start = tl.program_id(0).to(tl.int64) * length
    count = tl.minimum(total - start, length).to(tl.int32)
    if EVEN:
        start, count = tl.multiple_of(start, 16), tl.multiple_of(count, 16)
    best = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(w + start + column, mask=column < count, other=0.0)
        best = tl.maximum(best, rounding.magnitude(value.to(tl.float32)))
    tl.store(found + tl.program_id(0), tl.max(best, axis=0))


def largest(w: Tensor, *, by_row: bool) -> Tensor:
    """Contiguous w [N, K], not empty -> float32 [N], or of the whole matrix []. NaN and infinity stay."""
    total = w.numel()
    length = w.shape[1] if by_row else min(total, _PIECE)
    rows = triton.cdiv(total, length)
    found = torch.empty((rows,), dtype=torch.int32, device=w.device)
    even = total % 16 == 0 and length % 16 == 0
    _largest(lambda _: (rows,), w.device, w=w, found=found, total=total, length=length, EVEN=even)
    return (found if by_row else found.amax()).view(torch.float32)
