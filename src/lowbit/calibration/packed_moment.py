"""A matrix of second moments in a quarter of its room: the diagonal in float32, what is beside it in 16 bits.

|H[i, j]| is at most s_i s_j, s_i being the square root of H[i, i], so H[i, j] / (s_i s_j), a correlation about zero, is
stored in steps of 1/32767. Each is wrong by at most 1.53e-5: what some 4e9 tokens would leave of chance in it (the
standard deviation of a correlation is 1/sqrt(T)). The diagonal is exact, and packing what was unpacked gives the same
bits. Of the symmetric matrix the upper triangle is kept: rows in blocks of 64, each from its block's first column on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import StatisticsError
from lowbit.numerics.floats import divisor

_ROWS = 64  # of a block
_TOP = 32767  # stands for a correlation of 1
_LEAST = 1e-36  # second moments below it have few bits left, if any, and their channel no correlations
_SLACK = 1.01  # how far rounding may take sums of bfloat16 products past what no second moment exceeds
_TILE = 256  # columns that stay in the cache while they are transposed


def packed_size(k: int) -> int:
    """The number of 16-bit integers for a matrix [K, K]."""
    return sum(min(_ROWS, k - start) * (k - start) for start in range(0, k, _ROWS))


def pack_moment(moment: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The diagonal [K] (float32) and the correlations (int16 [packed_size(K)]) of a symmetric float32 matrix [K, K].

    Rows with values that are not finite get a diagonal of NaN, so that they stay what they are. Raises
    `StatisticsError`, naming `where`, for a matrix that cannot be one of second moments.
    """
    diagonal = moment.diagonal().clone()
    lost = ~diagonal.isfinite()  # channels that say so already: what others have of them says nothing of the others
    diagonal.masked_fill_(lost, torch.nan)
    inverse = torch.where(diagonal >= _LEAST, diagonal.rsqrt(), 0.0)
    columns = inverse * _TOP
    packed = torch.empty(packed_size(len(moment)), dtype=torch.int16, device=moment.device)
    for into, start, stop in _blocks(packed, len(moment)):
        x = moment[start:stop, start:] * inverse[start:stop, None]
        x.mul_(columns[start:]).round_()
        x[:, : stop - start].triu_()
        least, most = x.aminmax()
        largest = torch.maximum(most, -least)
        if not largest <= _TOP:  # NaN too
            finite = (moment[start:stop, start:].isfinite() | lost[start:]).all(1)
            diagonal[start:stop].masked_fill_(~finite, torch.nan)
            x.nan_to_num_(0.0).clamp_(-_TOP, _TOP)
            if bool(finite.all()) and float(largest) > _SLACK * _TOP:
                raise StatisticsError(
                    f"{where}: its second moments are none, some exceed what their channels' sizes allow "
                    f"({float(largest) / _TOP:.3g} times); give E[x x^T] of rows x"
                )
        into.copy_(x)
    return diagonal, packed


def unpack_moment(diagonal: Tensor, packed: Tensor) -> Tensor:
    """The matrix [K, K] that was packed, float32, symmetric to the bit."""
    k = len(diagonal)
    size = diagonal.sqrt()
    columns = size / divisor(_TOP, size)
    moment = diagonal.new_empty(k, k)
    for rows, start, stop in _blocks(packed, k):
        torch.mul(rows, size[start:stop, None], out=moment[start:stop, start:]).mul_(columns[start:])
    for start in range(0, k, _TILE):
        stop = min(start + _TILE, k)
        corner = moment[start:stop, start:stop].triu_(1)
        corner += corner.mT.clone()
        for left in range(stop, k, _TILE):
            right = min(left + _TILE, k)
            moment[left:right, start:stop] = moment[start:stop, left:right].mT
    moment.diagonal().copy_(diagonal)
    return moment


def _blocks(packed: Tensor, k: int) -> Iterator[tuple[Tensor, int, int]]:
    """Blocks of rows [rows, K - start] of what is packed, with the first and last of their rows."""
    at = 0
    for start in range(0, k, _ROWS):
        stop = min(start + _ROWS, k)
        count = (stop - start) * (k - start)
        yield packed[at : at + count].view(stop - start, k - start), start, stop
        at += count
