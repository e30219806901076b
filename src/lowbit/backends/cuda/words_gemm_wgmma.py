"""4-bit codes in words128 and more than 8 tokens of 16 bits, by products of a warpgroup (sm_90a).

Weights are decoded in registers and meet tokens from shared memory; no scale of 16 bits or more is rounded. Where there
are fewer tiles than multiprocessors, the columns are split over blocks, whose float32 sums a second kernel adds in
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.words_operands import HALVES, Operands
from lowbit.backends.gpu import target_of
from lowbit.layouts import words128

_SOURCE = "words_gemm_wgmma.cu"
_THREADS = 384
_KIB = 1024
# As in Plan of the kernel, which says why.
_PLACES = 6
_ROOM = {1: 225 * _KIB, 2: 112 * _KIB}
_REGISTERS = {1: 168, 2: 80}  # of a thread when a block begins, by the blocks of a multiprocessor
_MAILBOX = 8

# Reasoned, not measured: cycles, and bytes a cycle, of a multiprocessor.
_BYTES_FROM_MEMORY = 19.0  # when all read
_MOST_FROM_MEMORY = 30.0  # when few do
_BYTES_FROM_CACHE = 40.0
_PRODUCT = 16.0  # of 64 rows and 16 columns, at least
_DECODE = {False: 17.0, True: 25.0}  # instructions of a scheduler for as much, by whether scales multiply values
_OTHERS = 13.0  # a tile
_ISSUED = 0.8  # a cycle
_START = 2500.0  # of a block: the first codes, and its results
_SECOND_KERNEL = 2500.0
_MOST_SPLITS = 16
_FEWEST = 16  # tokens of a tile
_AT_ONCE = 65535 * _FEWEST  # tokens: as many blocks as a grid's second axis can have


@dataclass(frozen=True)
class _Tiles:
    """A block's share: tokens, tiles of 128 rows, and into how many parts K is split for it."""

    tokens: int
    tiles: int
    splits: int
    beside: int
    """Blocks that one multiprocessor runs side by side."""

    @property
    def rows(self) -> int:
        return 128 * self.tiles


@dataclass(frozen=True)
class _Kind:
    """What a weight needs beside its codes. `sixteens` of columns share a scale; 8 where a group has 128 or more."""

    sixteens: int
    zeros: bool
    pairs: bool
    """Whether scales multiply decoded values, not sums."""


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor) -> None:
    """Write rows [M, K] times the weight in words128, and bias [N], into out [.., N]."""
    if rows.shape[0] <= _AT_ONCE:
        _product(rows, operands, bias, out)
        return
    for some, found in zip(rows.split(_AT_ONCE), out.view(rows.shape[0], -1).split(_AT_ONCE), strict=True):
        _product(some, operands, bias, found)


def _product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor) -> None:
    (m, k), n = rows.shape, out.shape[-1]
    half, device = HALVES[rows.dtype], rows.device
    pairs = operands.scale_kind == "kE4M3" or (operands.scale_kind == "kE8M0" and rows.dtype == torch.bfloat16)
    kind = _Kind(operands.sixteens, operands.zero is not None, pairs)
    tiles = _tiles(m, n, k, kind, target_of(device).processors)
    name = (
        f"lowbit::words_gemm<lowbit::{operands.code}, {half}, lowbit::{operands.scale_kind}, {operands.has_zero}, "
        f"{kind.sixteens}, {tiles.tokens}, {tiles.tiles}>"
    )
    grid = (-(-n // tiles.rows), -(-m // tiles.tokens), tiles.splits)
    row_tiles, eights = grid[0] * tiles.rows // 64, grid[1] * tiles.tokens // 8
    sums = rows.new_empty((tiles.splits, row_tiles, eights, 128, 4), dtype=torch.float32) if tiles.splits > 1 else None
    arguments: list[kernels.Argument] = [
        rows, operands.codes, operands.scale, operands.zero, operands.alpha, operands.alpha_kind, bias, out, sums,
        m, n, k, operands.blocks_a_group,
    ]  # fmt: skip
    kernels.launch(
        _SOURCE, name, device, grid, _THREADS, arguments, _shared(tiles, kind), registers=_REGISTERS[tiles.beside]
    )
    if sums is not None:
        kernels.launch(
            _SOURCE, f"lowbit::add_word_splits<{half}>", device, (-(-n // 64), -(-m // _FEWEST)), 128,
            [sums, tiles.splits, row_tiles, eights, operands.alpha, operands.alpha_kind, bias, out, m, n],
        )  # fmt: skip


def _shared(tiles: _Tiles, kind: _Kind) -> int:
    """Bytes of shared memory: as Plan of the kernel lays it out."""
    groups = 8 // kind.sixteens
    place = 256 * tiles.tokens + 64 * tiles.rows + 4 * groups * tiles.rows
    place += 4 * groups * (tiles.rows + tiles.tokens) if kind.zeros else 0
    place = -(-place // _KIB) * _KIB
    places = min(_PLACES, _ROOM[tiles.beside] // place)
    return places * (place + 2 * _MAILBOX)


def _shapes(m: int, kind: _Kind) -> Iterator[tuple[tuple[int, int], int]]:
    """(Tokens, tiles) of a block for so many tokens, and how many such blocks share a multiprocessor: as in Plan."""
    for tokens in (_FEWEST, 32, 64, 128):
        for tiles in (2, 1):
            too_many_sums = (tokens, tiles) == (128, 2) and not kind.pairs and (kind.zeros or kind.sixteens < 4)
            if tokens < max(2 * m, _FEWEST + 1) and not too_many_sums:
                scales = tiles * (8 // kind.sixteens) * (2 if kind.zeros else 1)
                yield (tokens, tiles), 2 if tiles == 1 and tokens <= 32 and scales <= 8 else 1


@lru_cache(maxsize=1024)
def _tiles(m: int, n: int, k: int, kind: _Kind, processors: int) -> _Tiles:
    """The tiles that should take the fewest cycles."""
    blocks = k // words128.COLUMNS
    splits = range(1, min(blocks, _MOST_SPLITS) + 1)
    choices = [_Tiles(*shape, split, beside) for shape, beside in _shapes(m, kind) for split in splits]
    return min(choices, key=lambda tiles: _cycles(tiles, m, n, blocks, kind, processors))


def _cycles(tiles: _Tiles, m: int, n: int, blocks: int, kind: _Kind, processors: int) -> float:
    """Reasoned cycles: tensor cores, schedulers, memory and caches are busy at once; the slowest of them counts."""
    count = -(-n // tiles.rows) * -(-m // tiles.tokens) * tiles.splits
    turns = -(-count // (processors * tiles.beside))
    busy = min(tiles.beside, -(-count // processors))  # blocks that share a multiprocessor
    scaling = 0.0 if kind.pairs else tiles.tokens / 2 / kind.sixteens * (2.25 if kind.zeros else 1.0)
    issued = (_DECODE[kind.pairs] + _OTHERS / tiles.tiles + scaling) / _ISSUED
    products = tiles.rows / 8 * max(_PRODUCT, tiles.tokens / 2, issued)
    codes = 64 * tiles.rows
    cached = (codes + 256 * tiles.tokens) / _BYTES_FROM_CACHE
    from_memory = min(_MOST_FROM_MEMORY, _BYTES_FROM_MEMORY * processors / min(count, processors))
    read = codes / from_memory if m <= 128 else 0.0  # more tokens find the codes in the cache
    one = busy * max(products, cached, read) * -(-blocks // tiles.splits) + _START
    if tiles.splits > 1:
        one += busy * 8 * tiles.rows * tiles.tokens / _BYTES_FROM_CACHE
    return turns * one + (_SECOND_KERNEL if tiles.splits > 1 else 0.0)
