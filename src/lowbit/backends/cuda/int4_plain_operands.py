"""What the kernels of int4_plain_mm share: the weight as they take it, and the names of dtypes in their sources."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.w4a8 import BLOCK

DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16Type", torch.float16: "kFloat16Type"}
LOWEST = 16  # columns that a thread rounds


@dataclass(frozen=True)
class Operands:
    """Bytes [N, K/2]; scale and zero [N, K/group], or None for zeros of 8."""

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int


def pieces_of(group: int) -> int:
    """Groups in a block of 32 columns."""
    return max(1, BLOCK // group)


def shift_of(group: int) -> int:
    """The logarithm of the number of blocks in a group."""
    return max(1, group // BLOCK).bit_length() - 1
