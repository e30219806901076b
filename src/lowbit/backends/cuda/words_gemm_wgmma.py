"""linear for more than 8 tokens of 16 bits and 4-bit codes in the layout words128, by products of a warpgroup (sm_90a).

Weights are decoded in registers and meet tokens from shared memory; no scale of 16 bits or more is rounded. Where there
are fewer tiles than multiprocessors, the columns are split over blocks, whose float32 sums a second kernel adds in
order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.device_check import usable
from lowbit.backends.cuda.linear_words import _HALVES, _kind, _Operands, _operands, _refuses_groups
from lowbit.backends.gpu import target_of
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

_SOURCE = "words_gemm_wgmma.cu"
_FEWEST = 9  # tokens; linear_words takes fewer
_CAPABILITY = (9, 0)
_THREADS = 384
_STEP = 16
_ALIGNMENT = 16  # bytes of x and of codes that are copied at a time
_KIB = 1024
# As in Plan of the kernel, which says why.
_PLACES = 6
_ROOM = {1: 225 * _KIB, 2: 112 * _KIB}
_MAILBOX = 8

# Reasoned, not measured: cycles of a multiprocessor.
_BYTES_FROM_MEMORY = 19.0  # a cycle
_BYTES_FROM_CACHE = 40.0
_PRODUCT = 16.0  # of 64 rows and 16 columns, at least
_START = 2500.0  # of a block: the first codes, and its results
_SECOND_KERNEL = 2500.0
_MOST_SPLITS = 16


@dataclass(frozen=True)
class _Tiles:
    """A block's share: tokens, tiles of 128 rows, blocks of 128 columns split so many times."""

    tokens: int
    tiles: int
    splits: int

    @property
    def rows(self) -> int:
        return 128 * self.tiles

    @property
    def beside(self) -> int:
        """Blocks that one multiprocessor runs side by side."""
        return 2 if self.tiles == 1 and self.tokens <= 32 else 1


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    m = x.shape[:-1].numel()
    if m < _FEWEST:
        return f"{m} tokens; the kernel is for {_FEWEST} and more"
    if x.dtype not in _HALVES:
        return f"x is {_kind(x)}; the kernel takes bfloat16 and float16"
    target = target_of(x.device)
    if target.kind != "cuda":
        return "the GPU is not one of NVIDIA's"
    if target.capability != _CAPABILITY:
        have = ".".join(map(str, target.capability))
        return f"the GPU has compute capability {have}; the kernel is for 9.0 alone, whose products it uses"
    if why := usable(x.device):
        return why
    for name, tensor in (("bias", bias), *parts.items()):
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {_kind(bias)}, x {_kind(x)}; the kernel takes one dtype"
    return _refuses_groups(fmt, x, parts)


def linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K] in bfloat16 or float16, parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), codes, found = rows.shape, parts["qdata"], _operands(fmt, parts, x)
    n = codes.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    if rows.data_ptr() % _ALIGNMENT:
        rows = rows.clone()
    sixteens = min(found.group, words128.COLUMNS) // _STEP
    half, zeros = f"lowbit::{_HALVES[x.dtype]}", found.zero is not None
    tiles = _tiles(m, n, k, found, x.dtype, target_of(x.device).processors)
    name = (
        f"lowbit::words_gemm<lowbit::{found.code}, {half}, lowbit::{found.scale}, {str(zeros).lower()}, {sixteens}, "
        f"{tiles.tokens}, {tiles.tiles}>"
    )
    grid = (-(-n // tiles.rows), -(-m // tiles.tokens), tiles.splits)
    row_tiles, eights = grid[0] * tiles.rows // 64, grid[1] * tiles.tokens // 8
    sums = x.new_empty((tiles.splits, row_tiles, eights, 128, 4), dtype=torch.float32) if tiles.splits > 1 else None
    step = 0 if found.alpha is None or found.alpha.numel() == 1 else 1
    added = None if bias is None else bias.contiguous()
    arguments: list[kernels.Argument] = [
        rows, codes, parts["scale"], found.zero, found.alpha, step, added, out, sums, m, n, k,
        max(1, found.group // words128.COLUMNS),
    ]  # fmt: skip
    kernels.launch(_SOURCE, name, x.device, grid, _THREADS, arguments, shared=_shared(tiles, sixteens, zeros=zeros))
    if sums is not None:
        kernels.launch(
            _SOURCE, f"lowbit::add_word_splits<{half}>", x.device, (-(-n // 64), -(-m // 16)), 128,
            [sums, tiles.splits, row_tiles, eights, found.alpha, step, added, out, m, n],
        )  # fmt: skip
    return out


def _shared(tiles: _Tiles, sixteens: int, *, zeros: bool) -> int:
    """Bytes of shared memory: as Plan of the kernel lays it out."""
    groups = 8 // sixteens
    place = 256 * tiles.tokens + 64 * tiles.rows + 4 * groups * tiles.rows
    place += 4 * groups * (tiles.rows + tiles.tokens) if zeros else 0
    place = -(-place // _KIB) * _KIB
    places = min(_PLACES, _ROOM[tiles.beside] // place)
    return places * (place + 2 * _MAILBOX)


def _tiles(m: int, n: int, k: int, found: _Operands, dtype: torch.dtype, processors: int) -> _Tiles:
    """The tiles that should take the fewest cycles."""
    sixteens = min(found.group, words128.COLUMNS) // _STEP
    pairs = found.scale == "kE4M3" or (found.scale == "kE8M0" and dtype == torch.bfloat16)
    blocks = k // words128.COLUMNS
    shapes = [(tokens, tiles) for tokens in (16, 32, 64, 128) for tiles in (2, 1) if tokens < 2 * m]
    shapes = [shape for shape in shapes if shape != (128, 2) or pairs or sixteens > 2]  # registers
    choices = [_Tiles(*shape, splits) for shape in shapes for splits in range(1, min(blocks, _MOST_SPLITS) + 1)]
    return min(choices, key=lambda tiles: _cycles(tiles, m, n, blocks, processors))


def _cycles(tiles: _Tiles, m: int, n: int, blocks: int, processors: int) -> float:
    """Reasoned cycles: tensor cores, memory and caches are busy at once; the slowest of them counts."""
    count = -(-n // tiles.rows) * -(-m // tiles.tokens) * tiles.splits
    turns = -(-count // (processors * tiles.beside))
    busy = min(tiles.beside, -(-count // processors))  # blocks that share a multiprocessor
    products = tiles.rows / 64 * 8 * max(_PRODUCT, tiles.tokens / 2)
    codes = 64 * tiles.rows
    cached = (codes + 256 * tiles.tokens) / _BYTES_FROM_CACHE
    read = codes / _BYTES_FROM_MEMORY if m <= 128 else 0.0
    one = busy * max(products, cached, read) * -(-blocks // tiles.splits) + _START
    if tiles.splits > 1:
        one += busy * 8 * tiles.rows * tiles.tokens / _BYTES_FROM_CACHE
    return turns * one + (_SECOND_KERNEL if tiles.splits > 1 else 0.0)
