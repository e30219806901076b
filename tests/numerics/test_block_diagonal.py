"""Blocks along the diagonal of a matrix: what they hold, and that those of two matrices nest."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics.block_diagonal import blocks, count_of, diagonal, divided, shape_of


def square(n=24):
    """A second moment of n channels."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    return x @ x.mT


def dense(matrix):
    """The whole matrix [N, N], zero outside of the blocks."""
    return torch.block_diag(*(block for _, block in blocks(matrix)))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_blocks_are_what_lies_along_the_diagonal(count):
    """Every block is a piece of the matrix, at the rows that it is said to have; the diagonal is that of all."""
    whole = square()

    found = divided(whole, count)

    assert tuple(found.shape) == shape_of(24, count)
    assert count_of(found) == count
    assert torch.equal(diagonal(found).reshape(-1), whole.diagonal())
    for rows, block in blocks(found):
        assert torch.equal(block, whole[rows, rows])


def test_dividing_further_is_dividing_once():
    """Blocks of blocks are those of the whole; a matrix that has as many is given back."""
    halves = divided(square(), 2)

    assert torch.equal(divided(halves, 8), divided(square(), 8))
    assert divided(halves, 2) is halves
    assert int((dense(divided(halves, 4)) != 0).sum()) == 4 * 6 * 6


@pytest.mark.parametrize(("n", "count"), [(24, 3), (24, 16), (24, 0), (25, 2)])
def test_other_numbers_of_blocks_are_refused(n, count):
    """Neither a power of two nor a divisor of the rows would nest."""
    with pytest.raises(ValueError, match=f"{count} blocks of {n} rows"):
        shape_of(n, count)
