"""Pieces of a flat tensor, for kernels that look at values one by one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span(index, count, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Where the values of piece `index`, int64, lie in a tensor of `count`, and which there are: [BLOCK] each.

    EVEN: count is a multiple of 16. The compiler cannot see that in a comparison of 64-bit places with a number that
    it knows nothing of, and would read and write value by value.
    """
    start = index * BLOCK
    left = tl.minimum(count - start, BLOCK).to(tl.int32)
    if EVEN:
        left = tl.multiple_of(left, 16)
    inner = tl.arange(0, BLOCK)
    return start + inner, inner < left
