"""How many tokens the formats of e2m1 codes multiply in which way: what nvfp4 and mxfp4 share."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native

INT16, REGISTERS, PANELS, PAIRS = range(4)  # enum class E2m1Way
# Up to how many tokens the integers, by the columns that share a scale, or decoding in registers for float32, are
# faster than panels: measured on AVX2. Elsewhere it is not measured; a set that multiplies int8 four at a time should
# always be faster with integers.
_FEW_INT16 = {("avx2", 16): 32}
_FEW_FLOAT32 = 4
# The same of integers beside pairs of bfloat16, by the columns that share a scale, measured on Zen 4: for 10 tokens the
# two are equal, for 12 pairs are 10 % faster, for 64 a fifth. Groups that are not named have no pairs.
_FEW_PAIRED = {16: 10}
_ALWAYS = 1 << 30
_MOST_COLUMNS = 128  # that share a scale of the activations


def way(x: Tensor, m: int, group: int) -> int:
    """The fastest way to multiply m tokens in the dtype of x with a weight of groups of so many columns."""
    if x.dtype == torch.float32:
        return REGISTERS if m <= _FEW_FLOAT32 else PANELS
    if m > _FEW_PAIRED.get(group, _ALWAYS) and x.dtype == torch.bfloat16 and native.bf16_dots():
        return PAIRS
    return INT16 if m <= _FEW_INT16.get((native.isa(), group), _ALWAYS) else PANELS


def integer_block(k: int) -> int:
    """How many columns of the activations share a scale: the most that divide K, a power of two."""
    return min(_MOST_COLUMNS, k & -k)
