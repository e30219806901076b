"""ConvRot's rotation inside kernels: groups of 16, 64, 256 or 1024 columns times the regular Hadamard matrix.

The matrix of 4**n is a Kronecker power, so a group of 64 * 4**p columns is rotated as 64 times 64 in the tensor cores
and then p times as 4 times 4, on 4**p tensors that hold 64 columns each: sums and differences in registers. Values of
16 bits times powers of two are exact, and the sums are float32. A float32 value is cut into three of bfloat16, which
are the value, where there are tensor cores for them; elsewhere float32 is multiplied as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton.device import Target
from lowbit.numerics.constants import kept
from lowbit.numerics.rotations import REGULAR_SIZES, regular_hadamard

SIZES = REGULAR_SIZES
COLUMNS = 64  # of one tensor


def pieces(rotation: int) -> int:
    """How many tensors of `COLUMNS` columns a group of `rotation` is held in."""
    return max(1, rotation // COLUMNS)


def cuts(dtype: torch.dtype, target: Target) -> bool:
    """Whether values of this dtype are cut into three bfloat16."""
    return dtype == torch.float32 and target.assembles


def matrix(rotation: int, dtype: torch.dtype, target: Target, where: torch.device) -> Tensor:
    """The [64, 64] matrix that `rotate` multiplies by, in the dtype that it multiplies in."""
    return _matrix(rotation, torch.bfloat16 if cuts(dtype, target) else dtype, where)


@kept(maxsize=None)  # for good: a CUDA graph reads it as long as it lives
def _matrix(rotation: int, dtype: torch.dtype, where: torch.device) -> Tensor:
    inner = min(rotation, COLUMNS)
    block = torch.kron(torch.eye(COLUMNS // inner, device="cpu"), regular_hadamard(inner))
    # A power of two, as all of them are: exact also in 16 bits.
    return (block * (inner / rotation) ** 0.5).to(where, dtype)


@triton.jit
def rotate(values, hadamard, CUTS: tl.constexpr):
    """[R, 64] in the dtype of x, [64, 64] -> float32 [R, 64], the first step of the rotation."""
    if CUTS:
        high = _upper(values)
        rest = values - high
        middle = _upper(rest)
        sums = tl.dot((rest - middle).to(tl.bfloat16), hadamard)
        sums = tl.dot(middle.to(tl.bfloat16), hadamard, sums)
        sums = tl.dot(high.to(tl.bfloat16), hadamard, sums)
    else:
        sums = tl.dot(values, hadamard, input_precision="ieee")
    return sums


@triton.jit
def _upper(values):
    """The upper 16 bits of float32 values: what fits in a bfloat16 without rounding."""
    return (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _four(a, b, c, d):
    """The rows of the 4 x 4 matrix: 1 1 1 -1, 1 1 -1 1, 1 -1 1 1, -1 1 1 1."""
    plus, minus, other, less = a + b, a - b, c + d, c - d
    return plus + less, plus - less, minus + other, other - minus


@triton.jit
def combine(parts):
    """A tuple of 1, 4 or 16 tensors of a group, each rotated by `rotate` -> the same of the whole group's rotation."""
    count: tl.constexpr = len(parts)
    if count == 1:
        made = parts
    elif count == 4:
        made = _four(parts[0], parts[1], parts[2], parts[3])
    else:
        a = _four(parts[0], parts[1], parts[2], parts[3])
        b = _four(parts[4], parts[5], parts[6], parts[7])
        c = _four(parts[8], parts[9], parts[10], parts[11])
        d = _four(parts[12], parts[13], parts[14], parts[15])
        e = _four(a[0], b[0], c[0], d[0])
        f = _four(a[1], b[1], c[1], d[1])
        g = _four(a[2], b[2], c[2], d[2])
        h = _four(a[3], b[3], c[3], d[3])
        made = (
            e[0], f[0], g[0], h[0], e[1], f[1], g[1], h[1], e[2], f[2], g[2], h[2], e[3], f[3], g[3], h[3],
        )  # fmt: skip
    return made
