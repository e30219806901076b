"""Groups and tiles: sizes, padding, reductions over ragged edges, walking a matrix in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from lowbit.numerics.groups import ceil_div, expand_tiles, is_tile, pad_to, reduce_tiles, round_up, row_chunks

SHAPES = [(1, 1), (5, 7), (128, 128), (130, 257), (3, 300), (256, 64)]
TILES = [(1, 1), (1, 32), (2, 3), (128, 128), (64, 1), (500, 500)]


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_division_rounds_up(a, b):
    """ceil_div is the least count of b that covers a, and round_up that many times b."""
    count = ceil_div(a, b)
    assert count * b >= a > (count - 1) * b
    assert round_up(a, b) == count * b


@given(st.integers(1, 5000), st.integers(0, 3000), st.integers(1, 200), st.integers(1, 10**5))
def test_row_chunks_cover_every_row_once(rows, columns, multiple, elements):
    """The ranges join, start at multiples, and hold no more than they must."""
    chunks = list(row_chunks(rows, columns, multiple, elements))
    assert chunks[0][0] == 0
    assert chunks[-1][1] == rows
    assert all(a[1] == b[0] for a, b in pairwise(chunks))
    assert all(start % multiple == 0 and stop > start for start, stop in chunks)
    assert all((stop - start) * columns <= max(elements, multiple * columns) for start, stop in chunks)


def test_no_rows_are_one_empty_range():
    """A loop over the ranges of an empty matrix runs once, with nothing."""
    assert list(row_chunks(0, 64)) == [(0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_padding_adds_zeros_at_the_bottom_and_the_right(dtype):
    """The values stay, the rest is zero, for float8 as well."""
    x = torch.randn(3, 5).to(dtype)
    padded = pad_to(x, 4, 8)
    assert padded.dtype == dtype
    assert torch.equal(padded[:3, :5].float(), x.float())
    assert padded.float().abs().sum() == x.float().abs().sum()


def test_padding_to_the_same_size_is_no_copy():
    """A matrix that has the size already is returned as it is."""
    x = torch.randn(3, 5)
    assert pad_to(x, 3, 5) is x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("op", ["amax", "sum"])
def test_tiles_reduce_like_a_loop(shape, tile, op):
    """Every entry is the reduction of its own tile, cut off at the edges, and nothing of its neighbours."""
    x = torch.randint(0, 100, shape).float()  # sums of integers are exact in any order
    got = reduce_tiles(x, tile, op)
    reduce = torch.amax if op == "amax" else torch.sum
    expected = [[reduce(b) for b in rows.split(tile[1], dim=1)] for rows in x.split(tile[0], dim=0)]
    assert torch.equal(got, torch.tensor(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", TILES)
def test_expanding_tiles_gives_each_element_the_value_of_its_tile(shape, tile):
    """Element (i, j) gets entry (i // rows, j // columns)."""
    values = torch.randn(ceil_div(shape[0], tile[0]), ceil_div(shape[1], tile[1]))
    expanded = expand_tiles(values, tile, shape)
    i, j = torch.arange(shape[0])[:, None] // tile[0], torch.arange(shape[1])[None] // tile[1]
    assert expanded.shape == shape
    assert torch.equal(expanded, values[i, j])


@pytest.mark.parametrize(
    ("size", "good"),
    [
        ((1, 1), True),
        ((128, 64), True),
        ((0, 1), False),
        ((1,), False),
        (128, False),
        ((1.0, 2), False),
        ((True, 2), False),
    ],
)
def test_a_tile_is_two_whole_numbers_above_zero(size, good):
    """Anything else is refused, truth values and floats included."""
    assert is_tile(size) is good
