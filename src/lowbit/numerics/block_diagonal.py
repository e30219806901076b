"""Symmetric matrices [N, N] of which all is known, or only blocks of equal size along the diagonal: [B, N/B, N/B].

B is a power of two, so that of two such matrices the blocks of one lie in those of the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def shape_of(n: int, count: int) -> tuple[int, ...]:
    """Of a matrix of N rows in `count` blocks; one block is the matrix itself. Raises `ValueError` for other counts."""
    if count == 1:
        return n, n
    if count < 1 or count & (count - 1) or n % count:
        raise ValueError(f"{count} blocks of {n} rows; their number is a power of two that divides the rows")
    return count, n // count, n // count


def count_of(matrix: Tensor) -> int:
    """Into how many blocks a matrix is divided."""
    return matrix.shape[0] if matrix.dim() == 3 else 1


def blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each block, and the block [b, b], which shares memory with the matrix."""
    if matrix.dim() == 2:
        yield slice(0, matrix.shape[0]), matrix
        return
    size = matrix.shape[1]
    for index, block in enumerate(matrix):
        yield slice(index * size, (index + 1) * size), block


def diagonal(matrix: Tensor) -> Tensor:
    """A view of the diagonal: [N], of several blocks [B, b]."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def divided(matrix: Tensor, count: int) -> Tensor:
    """What of a matrix lies in `count` blocks, which are no fewer than it has: a new tensor, or the same as it is."""
    have = count_of(matrix)
    if have == count:
        return matrix
    n = diagonal(matrix).numel()
    shape = shape_of(n, count)
    found = matrix.new_empty(shape)
    each, size = count // have, shape[-1]
    for index, (_, block) in enumerate(blocks(matrix)):
        for inner in range(each):
            here = slice(inner * size, (inner + 1) * size)
            found[index * each + inner] = block[here, here]
    return found
