"""4-bit codes, in words128 or plain bytes, and more than 8 tokens of 16 bits, on the tensor cores of a warp.

Weights are decoded in registers for all tokens of a tile: there is no copy of them in 16 bits. No scale is rounded: in
sums of float32, or multiplied with the decoded values where the product is exact. From sm_80 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.words_operands import HALVES, STEP, Operands
from lowbit.backends.gpu import Target, target_of
from lowbit.layouts import words128

_SOURCE = "words_gemm_mma.cu"
_ROWS_A_WARP, _TILES = 32, 2  # of a weight; tiles of 16 of them
_CODE_BYTES, _TOKEN_BYTES = 64, 256  # of 128 columns of a row of the weight, of a token
_STAGES = (4, 3, 2)  # steps of columns in shared memory
_FEW_STEPS = 4  # that a block multiplies at least when columns are shared out among blocks
_MOST_SPLITS = 16
# Kilobytes of shared memory that a block may have; other GPUs have as much as the smallest.
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED = 99


@dataclass(frozen=True)
class _Tile:
    """What a block of threads multiplies, and how its warps share that out.

    `parts` of the warps take columns in turn. `resident` blocks can share a multiprocessor by their registers.
    """

    row_warps: int
    columns: int  # eights of tokens of a warp
    token_warps: int = 1
    parts: int = 1
    resident: int = 2

    @property
    def rows(self) -> int:
        return _ROWS_A_WARP * self.row_warps

    @property
    def tokens(self) -> int:
        return 8 * self.columns * self.token_warps

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.token_warps * self.parts


# By tokens, most rows first: more rows share a tile of tokens, which comes from the second-level cache once for each
# tile of rows; fewer make enough blocks for all multiprocessors. Reasoned, not measured.
_TILES_BY_TOKENS = {
    16: (_Tile(4, 2, parts=2), _Tile(2, 2, parts=4), _Tile(1, 2, parts=8)),
    32: (_Tile(4, 4), _Tile(2, 4, parts=2)),
    64: (_Tile(8, 8, resident=1), _Tile(4, 8), _Tile(2, 8, parts=2)),
    128: (_Tile(4, 8, token_warps=2, resident=1),),
}
_MOST_OF_SMALL_GROUPS = 32  # tokens of a tile: sums over groups of 16 and 32 columns need registers of their own


@dataclass(frozen=True)
class _Kind:
    """What a weight needs beside its codes; `scales_sums`: scales multiply sums over a group, not decoded values."""

    group: int
    zeros: bool
    scales_sums: bool


@dataclass(frozen=True)
class _Plan:
    tile: _Tile
    stages: int
    splits: int
    shared: int


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor, *, plain: bool) -> None:
    """Write rows [M, K] times the weight, and bias [N], into out [.., N]. plain: codes are bytes, not words128."""
    (m, k), n = rows.shape, out.shape[-1]
    half, device = HALVES[rows.dtype], rows.device
    kind = _Kind(operands.group, operands.zero is not None, _scales_sums(operands, rows.dtype))
    plan = _plan(kind, m, n, k, target_of(device))
    tile = plan.tile
    name = (
        f"lowbit::words_gemm<lowbit::{operands.code}, {half}, lowbit::{operands.scale_kind}, {operands.has_zero}, "
        f"lowbit::{'kBytes' if plain else 'kWords'}, {operands.sixteens}, {_TILES}, {tile.columns}, "
        f"{tile.row_warps}, {tile.token_warps}, {tile.parts}, {plan.stages}>"
    )
    sums = torch.empty((plan.splits, m, n), dtype=torch.float32, device=device) if plan.splits > 1 else None
    grid = (-(-m // tile.tokens), -(-n // tile.rows), plan.splits)
    kernels.launch(
        _SOURCE, name, device, grid, tile.threads,
        [
            rows, operands.codes, operands.scale, operands.zero, operands.alpha, operands.alpha_kind, bias, out, sums,
            m, n, k, operands.blocks_a_group,
        ],
        shared=plan.shared,
    )  # fmt: skip
    if sums is not None:
        kernels.launch(
            _SOURCE, f"lowbit::add_splits<{half}>", device, (-(-n // 256), m), 256,
            [sums, operands.alpha, operands.alpha_kind, bias, out, plan.splits, m, n],
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _plan(kind: _Kind, m: int, n: int, k: int, target: Target) -> _Plan:
    """The tile for a product, the steps that it keeps in shared memory, and over how many blocks its columns go."""
    small = kind.scales_sums and kind.group < 4 * STEP
    tiles = _TILES_BY_TOKENS[_tokens_of_tile(m, _MOST_OF_SMALL_GROUPS if small else 128)]
    limit = 1024 * _SHARED.get(target.capability, _LEAST_SHARED)
    fitting = [tile for tile in tiles if _shared(kind, tile, _STAGES[-1]) <= limit]
    enough = 0.7 * target.processors  # fewer blocks leave too much of the GPU idle
    blocks = {tile: -(-m // tile.tokens) * -(-n // tile.rows) for tile in fitting}
    tile = next((tile for tile in fitting if blocks[tile] >= enough), fitting[-1])
    splits = 1
    if blocks[tile] < enough:
        steps = -(-(k // words128.COLUMNS) // tile.parts)
        splits = max(1, min(2 * target.processors // blocks[tile], steps // _FEW_STEPS, _MOST_SPLITS))
    stages = _stages(kind, tile, limit)
    return _Plan(tile, stages, splits, _shared(kind, tile, stages))


def _scales_sums(operands: Operands, dtype: torch.dtype) -> bool:
    """Whether scales multiply sums over a group, not the decoded values: where their product would be rounded."""
    return operands.code == "kIntegers" or (operands.scale_kind == "kE8M0" and dtype != torch.bfloat16)


def _tokens_of_tile(m: int, most: int) -> int:
    """Tokens of a tile: as few tiles as there can be without more tokens that are not there."""
    for tokens in _TILES_BY_TOKENS:
        if m <= tokens <= most:
            return tokens
    if most > 64 and -(-m // 128) * 128 > -(-m // 64) * 64:
        return 64
    return most


def _stages(kind: _Kind, tile: _Tile, limit: int) -> int:
    """As many steps as still let the blocks share a multiprocessor that can by their registers."""
    together = limit // tile.resident - 1024  # what each block takes beside its own
    for room in (together, limit):
        for stages in _STAGES:
            if _shared(kind, tile, stages) <= room:
                return stages
    raise AssertionError("a tile was chosen that does not fit")


def _shared(kind: _Kind, tile: _Tile, stages: int) -> int:
    """Bytes of shared memory of a block: the steps and what belongs to them, or the finished tile."""
    step = tile.parts * (tile.rows * _CODE_BYTES + tile.tokens * _TOKEN_BYTES)
    groups = max(1, words128.COLUMNS // kind.group)
    scales = 2 * tile.parts * groups * tile.rows * 4
    totals = 2 * tile.parts * max(groups, 2) * tile.tokens * 4
    loop = stages * step + (2 * scales + totals if kind.zeros else scales)
    return max(loop, tile.parts * tile.tokens * (tile.rows + 4) * 4)
