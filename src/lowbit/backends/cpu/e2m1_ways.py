"""How many tokens the formats of e2m1 codes multiply in which way: what nvfp4 and mxfp4 share."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native

INT16, REGISTERS, PANELS = range(3)  # enum class E2m1Way
# Up to how many tokens the integers, by the columns that share a scale, or decoding in registers for float32, are
# faster than panels: measured on AVX2. Elsewhere it is not measured; a set that multiplies int8 four at a time should
# always be faster with integers.
_FEW_INT16 = {("avx2", 16): 32}
_FEW_FLOAT32 = 4
_ALWAYS = 1 << 30
_MOST_COLUMNS = 128  # that share a scale of the activations


def way(x: Tensor, m: int, group: int) -> int:
    """The fastest way to multiply m tokens in the dtype of x with a weight of groups of so many columns."""
    if x.dtype == torch.float32:
        return REGISTERS if m <= _FEW_FLOAT32 else PANELS
    return INT16 if m <= _FEW_INT16.get((native.isa(), group), _ALWAYS) else PANELS


def integer_block(k: int) -> int:
    """How many columns of the activations share a scale: the most that divide K, a power of two."""
    return min(_MOST_COLUMNS, k & -k)
