"""Orthogonal rotations of groups along K.

The regular Hadamard matrix of size 4**n (ConvRot, arXiv 2512.03673) is the Kronecker power of a 4 x 4 Hadamard matrix
whose rows all have the same sum, divided by its size's root. It is symmetric and its own inverse; unlike Sylvester's
matrix it has no row of ones, so a constant offset of a group is not gathered into one spike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.numerics.constants import kept

REGULAR_SIZES = (16, 64, 256, 1024)
_H4 = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))


@kept(maxsize=16)
def regular_hadamard(size: int) -> Tensor:
    """The [size, size] float32 regular Hadamard matrix on the CPU, orthonormal. Do not write to it: it is cached.

    Raises `FormatError` when `size` is not a power of four.
    """
    if size < 4 or size & (size - 1) or (size.bit_length() - 1) % 2:
        raise FormatError(f"a regular Hadamard rotation needs a group size that is a power of 4, not {size}")
    step = torch.tensor(_H4, dtype=torch.float32, device="cpu")
    matrix = step
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, step)
    return matrix / size**0.5


@kept(maxsize=None)
def _hadamard_on(size: int, device: torch.device) -> Tensor:
    return regular_hadamard(size).to(device)


def rotate_groups(x: Tensor, group_size: int) -> Tensor:
    """Rotate every group of `group_size` along the last axis. [..., K] -> [..., K], float32 inside, dtype of x.

    The rotation is its own inverse. It is applied to weights when they are made and to activations when they are used.
    Raises `FormatError` when the groups do not divide K or have no rotation.
    """
    matrix = _hadamard_on(group_size, x.device)
    if x.shape[-1] % group_size:
        raise FormatError(f"K = {x.shape[-1]} is not a multiple of the rotation group {group_size}")
    groups = x.float().reshape(-1, group_size)
    return (groups @ matrix).reshape(x.shape).to(x.dtype)
