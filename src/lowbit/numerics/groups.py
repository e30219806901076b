"""Groups along K and tiles over (N, K): shapes, padding, reductions, and walking a matrix in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # a float32 temporary of 1 MiB: stays in the L2 cache of one core


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of b that is not below a."""
    return ceil_div(a, b) * b


def row_chunks(rows: int, columns: int, multiple: int = 1, elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(start, stop) ranges that cover `rows`, each about `elements` values large and a multiple of `multiple` rows.

    No rows give one empty range, so that a loop over the ranges sees the shapes at least once.
    """
    if not rows:
        yield 0, 0
        return
    step = max(multiple, elements // max(columns, 1) // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def pad_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad a matrix at its bottom and right to (rows, columns); the same tensor when it already has that size."""
    bottom, right = rows - x.shape[0], columns - x.shape[1]
    if not bottom and not right:
        return x
    out = x.new_zeros((rows, columns)) if x.dtype.itemsize > 1 else zeros_of(x, rows, columns)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def zeros_of(x: Tensor, rows: int, columns: int) -> Tensor:
    """A zero matrix with the dtype and device of `x`, for one-byte dtypes that lack `zeros`: zero bits are zero."""
    return torch.zeros((rows, columns), dtype=torch.uint8, device=x.device).view(x.dtype)


def is_tile(size: object) -> bool:
    """Whether `size` gives the edges of a tile: a tuple of two whole numbers above 0."""
    return isinstance(size, tuple) and len(size) == 2 and all(type(edge) is int and edge > 0 for edge in size)


def reduce_tiles(x: Tensor, tile: tuple[int, int], op: str) -> Tensor:
    """Reduce [N, K] over tiles of (rows, columns), ragged edges included -> [ceil(N / rows), ceil(K / columns)].

    `op` is "amax" or "sum". Zero padding is neutral for both (amax is meant for magnitudes).
    """
    rows, columns = ceil_div(x.shape[0], tile[0]), ceil_div(x.shape[1], tile[1])
    padded = pad_to(x, rows * tile[0], columns * tile[1])
    view = padded.view(rows, tile[0], columns, tile[1])
    if op == "amax":
        # Rows first: that reduction is vectorized, and leaves less for the slow one over short runs.
        return view.amax(dim=1).amax(dim=-1)
    return view.sum(dim=(1, 3))


def expand_tiles(values: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Repeat one value a tile back to [N, K]; the inverse shape of `reduce_tiles`. Broadcasts where it can."""
    n, k = shape
    # Columns first: they are repeated in the small tensor, then whole rows are copied.
    if values.shape[1] > 1:
        values = values.repeat_interleave(min(tile[1], k), dim=1)[:, :k]
    if values.shape[0] > 1:
        values = values.repeat_interleave(min(tile[0], n), dim=0)[:n]
    return values.expand(n, k)


def group_amax(x: Tensor, group: int) -> Tensor:
    """The largest magnitude in every run of `group` columns: float32 [N, K] -> [N, ceil(K / group)]. NaN propagates.

    Magnitudes are ordered as their bits are, and PyTorch reduces short runs of int32 on a CPU three times faster than
    those of float32.
    """
    groups = ceil_div(x.shape[1], group)
    bits = pad_to(x, x.shape[0], groups * group).view(torch.int32) & 0x7FFFFFFF
    return bits.unflatten(1, (groups, group)).amax(dim=-1).view(torch.float32)
