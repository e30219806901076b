"""linear for more than 8 tokens of 16 bits and 4-bit codes, in words128 or plain bytes, on the tensor cores of a warp.

Weights are decoded in registers for all tokens of a tile: there is no copy of them in 16 bits. No scale is rounded: in
sums of float32, or multiplied with the decoded values where the product is exact. From sm_80 on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels, linear_words
from lowbit.backends.cuda.linear_words import _HALVES, _STEP, _Operands, _operands
from lowbit.backends.gpu import Target, target_of
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

TOKENS = range(9, 1 << 31)
"""How many tokens the kernel takes."""

_SOURCE = "words_gemm_mma.cu"
_ROWS_A_WARP, _TILES = 32, 2  # of a weight; tiles of 16 of them
_CODE_BYTES, _TOKEN_BYTES = 64, 256  # of 128 columns of a row of the weight, of a token
_X_ALIGNMENT = 16  # bytes of x that a thread copies at a time
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
class _Plan:
    tile: _Tile
    stages: int
    splits: int
    shared: int


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None. But for the number of tokens, it is as for `linear_words`."""
    return _refuses_tokens(x) or linear_words.refuses(fmt, _one_token(x), parts, bias)


def refuses_plain(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """The same for parts as files hold them."""
    return _refuses_tokens(x) or linear_words.refuses_plain(fmt, _one_token(x), parts, bias)


def _refuses_tokens(x: Tensor) -> str | None:
    m = x.shape[:-1].numel()
    return None if m in TOKENS else f"{m} tokens; the kernel takes {TOKENS.start} and more"


def _one_token(x: Tensor) -> Tensor:
    return x[(0,) * (x.dim() - 1)]


def linear_plain(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """`linear` for plain parts of awq_w4a16: bytes [N, K/2], scales and zeros [K/g, N]."""
    return linear(fmt, x, parts, bias, "kBytes")


def linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, storage: str = "kWords") -> Tensor:
    """x [..., K] of 9 tokens and more, parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), codes, found = rows.shape, parts["qdata"], _operands(fmt, parts, x)
    n = codes.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    if rows.device.type != "meta" and rows.data_ptr() % _X_ALIGNMENT:
        rows = rows.clone()
    bias = None if bias is None else bias.contiguous()
    half = f"lowbit::{_HALVES[x.dtype]}"
    sixteens = min(found.group, words128.COLUMNS) // _STEP
    plan = _plan(found, x.dtype, m, n, k, target_of(x.device))
    tile = plan.tile
    name = (
        f"lowbit::words_gemm<lowbit::{found.code}, {half}, lowbit::{found.scale}, "
        f"{str(found.zero is not None).lower()}, lowbit::{storage}, {sixteens}, {_TILES}, "
        f"{tile.columns}, {tile.row_warps}, {tile.token_warps}, {tile.parts}, {plan.stages}>"
    )
    step = 0 if found.alpha is None or found.alpha.numel() == 1 else 1
    sums = torch.empty((plan.splits, m, n), dtype=torch.float32, device=x.device) if plan.splits > 1 else None
    grid = (-(-m // tile.tokens), -(-n // tile.rows), plan.splits)
    kernels.launch(
        _SOURCE, name, x.device, grid, tile.threads,
        [
            rows, codes, parts["scale"], found.zero, found.alpha, step, bias, out, sums, m, n, k,
            max(1, found.group // words128.COLUMNS),
        ],
        shared=plan.shared,
    )  # fmt: skip
    if sums is not None:
        kernels.launch(
            _SOURCE, f"lowbit::add_splits<{half}>", x.device, (-(-n // 256), m), 256,
            [sums, found.alpha, step, bias, out, plan.splits, m, n],
        )  # fmt: skip
    return out


def _plan(operands: _Operands, dtype: torch.dtype, m: int, n: int, k: int, target: Target) -> _Plan:
    """The tile for a product, the steps that it keeps in shared memory, and over how many blocks its columns go."""
    small = _scales_sums(operands, dtype) and operands.group < 4 * _STEP
    tiles = _TILES_BY_TOKENS[_tokens_of_tile(m, _MOST_OF_SMALL_GROUPS if small else 128)]
    limit = 1024 * _SHARED.get(target.capability, _LEAST_SHARED)
    fitting = [tile for tile in tiles if _shared(operands, tile, _STAGES[-1]) <= limit]
    enough = 0.7 * target.processors  # fewer blocks leave too much of the GPU idle
    blocks = {tile: -(-m // tile.tokens) * -(-n // tile.rows) for tile in fitting}
    tile = next((tile for tile in fitting if blocks[tile] >= enough), fitting[-1])
    splits = 1
    if blocks[tile] < enough:
        steps = -(-(k // words128.COLUMNS) // tile.parts)
        splits = max(1, min(2 * target.processors // blocks[tile], steps // _FEW_STEPS, _MOST_SPLITS))
    stages = _stages(operands, tile, limit)
    return _Plan(tile, stages, splits, _shared(operands, tile, stages))


def _scales_sums(operands: _Operands, dtype: torch.dtype) -> bool:
    """Whether scales multiply sums over a group, not the decoded values: where their product would be rounded."""
    return operands.code == "kIntegers" or (operands.scale == "kE8M0" and dtype != torch.bfloat16)


def _tokens_of_tile(m: int, most: int) -> int:
    """Tokens of a tile: as few tiles as there can be without more tokens that are not there."""
    for tokens in _TILES_BY_TOKENS:
        if m <= tokens <= most:
            return tokens
    if most > 64 and -(-m // 128) * 128 > -(-m // 64) * 64:
        return 64
    return most


def _stages(operands: _Operands, tile: _Tile, limit: int) -> int:
    """As many steps as still let the blocks share a multiprocessor that can by their registers."""
    together = limit // tile.resident - 1024  # what each block takes beside its own
    for room in (together, limit):
        for stages in _STAGES:
            if _shared(operands, tile, stages) <= room:
                return stages
    raise AssertionError("a tile was chosen that does not fit")


def _shared(operands: _Operands, tile: _Tile, stages: int) -> int:
    """Bytes of shared memory of a block: the steps and what belongs to them, or the finished tile."""
    step = tile.parts * (tile.rows * _CODE_BYTES + tile.tokens * _TOKEN_BYTES)
    groups = max(1, words128.COLUMNS // operands.group)
    scales = 2 * tile.parts * groups * tile.rows * 4
    totals = 2 * tile.parts * max(groups, 2) * tile.tokens * 4
    loop = stages * step + (scales if operands.zero is None else 2 * scales + totals)
    return max(loop, tile.parts * tile.tokens * (tile.rows + 4) * 4)
