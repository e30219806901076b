"""The orders in which nunchaku stores SVDQuant and AWQ layers: as its tensor-core kernels read them, 16 bytes a lane.

SVDQuant, in tiles of 128 rows n = 128 T + 16 p + 8 a + l and 64 columns k = 64 t + 32 b + 8 c + r; lane 4 l + c of a
warp holds the fragments of mma.m16n8k64 for two times eight rows (a) and two times 32 columns (b):

    codes      word  ((((T K/64 + t) 8 + p) 8 + l) 4 + c) 4 + 2 a + b,  nibble r
    scales     n = 128 T + 16 u + 8 v + 2 c + e, group g:  (T G + g) 128 + 16 u + 4 c + 2 v + e
    channels   smoothing factors and biases, as scales with G = 1
    proj_down  k = 16 C + 8 b + 2 c + e, r = 16 P + 8 a + l:  (((C R/16 + P) 8 + l) 4 + c) 8 + 4 a + 2 b + e
    proj_up    n = 16 C + 8 a + l, r = 16 P + 8 b + 2 c + e:  the same

AWQ, in runs of four rows n = 4 q + i and 64 columns k = 64 t + 32 h + 8 m + j, 16-bit words:

    codes      word  ((q K/64 + t) 4 + i) 16 + 8 h + j,  nibble m

Shapes of stored tensors are those of the plain ones and mean nothing beyond their size. Sources: nunchaku
(`gemm_base.cuh`, `lora.cuh`, `gemv_awq.cu`) and deepcompressor's packers, which agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

ROWS = 128
COLUMNS = 64
LOW_RANK = 16
QUAD = 4


def untile_codes(stored: Tensor, n: int, k: int) -> Tensor:
    """int8 [N, K/2] in tiles -> int8 [N, K/2], the even column in the low nibble."""
    _check("qweight", stored, n * k // 2, n % ROWS == 0 and k % COLUMNS == 0, f"[{n}, {k // 2}]")
    words = _flat(stored).view(torch.int32).view(n // ROWS, k // COLUMNS, 8, 8, 4, 2, 2)  # T t p l c a b
    rows = words.permute(0, 2, 5, 3, 1, 6, 4).contiguous()  # T p a l t b c
    return rows.view(torch.int8).view(n, k // 2)


def tile_codes(plain: Tensor) -> Tensor:
    """The inverse of `untile_codes`."""
    n, k = plain.shape[0], 2 * plain.shape[1]
    words = _flat(plain).view(torch.int32).view(n // ROWS, 8, 2, 8, k // COLUMNS, 2, 4)
    return words.permute(0, 4, 1, 3, 6, 2, 5).contiguous().view(torch.int8).view(n, k // 2)


def untile_scales(stored: Tensor) -> Tensor:
    """[G, N] in tiles -> [G, N]."""
    groups, n = stored.shape
    _check("wscales", stored, groups * n, n % ROWS == 0, f"[{groups}, {n}]")
    tiles = stored.contiguous().view(n // ROWS, groups, 8, 4, 2, 2)  # T g u c v e
    return tiles.permute(1, 0, 2, 4, 3, 5).reshape(groups, n)


def tile_scales(plain: Tensor) -> Tensor:
    """The inverse of `untile_scales`."""
    groups, n = plain.shape
    tiles = plain.reshape(groups, n // ROWS, 8, 2, 4, 2)
    return tiles.permute(1, 0, 2, 4, 3, 5).reshape(groups, n)


def channel_places(n: int) -> Tensor:
    """Where each of N channels lies in a stored vector: int64 [N]."""
    return untile_scales(torch.arange(n).unsqueeze(0)).squeeze(0)


def untile_down(stored: Tensor) -> Tensor:
    """proj_down [K, R] in tiles -> [K, R]."""
    k, rank = _low_rank("proj_down", stored)
    tiles = stored.contiguous().view(k // LOW_RANK, rank // LOW_RANK, 8, 4, 2, 2, 2)  # C P l c a b e
    return tiles.permute(0, 5, 3, 6, 1, 4, 2).reshape(k, rank)


def tile_down(plain: Tensor) -> Tensor:
    """The inverse of `untile_down`."""
    k, rank = plain.shape
    tiles = plain.reshape(k // LOW_RANK, 2, 4, 2, rank // LOW_RANK, 2, 8)  # C b c e P a l
    return tiles.permute(0, 4, 6, 2, 5, 1, 3).reshape(k, rank)


def untile_up(stored: Tensor) -> Tensor:
    """proj_up [N, R] in tiles -> [N, R]."""
    n, rank = _low_rank("proj_up", stored)
    tiles = stored.contiguous().view(n // LOW_RANK, rank // LOW_RANK, 8, 4, 2, 2, 2)  # C P l c a b e
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)


def tile_up(plain: Tensor) -> Tensor:
    """The inverse of `untile_up`."""
    n, rank = plain.shape
    tiles = plain.reshape(n // LOW_RANK, 2, 8, rank // LOW_RANK, 2, 4, 2)  # C a l P b c e
    return tiles.permute(0, 3, 2, 5, 1, 4, 6).reshape(n, rank)


def untile_awq(stored: Tensor, n: int, k: int) -> Tensor:
    """int32 [N/4, K/2] -> int8 [N, K/2], the even column in the low nibble."""
    _check("qweight", stored, n * k // 8, n % QUAD == 0 and k % COLUMNS == 0, f"[{n // QUAD}, {k // 2}]")
    codes = unpack_nibbles(_flat(stored)).view(n // QUAD, k // COLUMNS, QUAD, 2, 8, 4)  # q t i h j m
    return pack_nibbles(codes.permute(0, 2, 1, 3, 5, 4).reshape(n, k)).view(torch.int8)


def tile_awq(plain: Tensor) -> Tensor:
    """The inverse of `untile_awq`."""
    n, k = plain.shape[0], 2 * plain.shape[1]
    codes = unpack_nibbles(plain).view(n // QUAD, QUAD, k // COLUMNS, 2, 4, 8)  # q i t h m j
    packed = pack_nibbles(codes.permute(0, 2, 1, 3, 5, 4).reshape(n, k))
    return packed.view(-1).view(torch.int32).view(n // QUAD, k // 2)


def _flat(stored: Tensor) -> Tensor:
    """The bytes, in memory that starts at a word."""
    return stored.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _low_rank(name: str, stored: Tensor) -> tuple[int, int]:
    size, rank = stored.shape
    _check(name, stored, size * rank, size % LOW_RANK == 0 and rank % LOW_RANK == 0, "multiples of 16")
    return size, rank


def _check(name: str, stored: Tensor, size: int, whole: bool, expected: str) -> None:
    """Raise `PartsError` for a size that is not that of whole tiles."""
    if not whole or stored.numel() != size:
        raise PartsError(f"{name} has shape {list(stored.shape)}, expected {expected} in whole tiles of nunchaku")
