"""4-bit codes and up to 8 tokens of 16 bits: weights are read once whatever the number of tokens, in one launch."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.words_operands import HALVES, STEP, Operands
from lowbit.backends.gpu import target_of
from lowbit.numerics.groups import ceil_div

MOST = 8  # tokens
_SOURCE = "words_gemv.cu"
_WARPS = 8  # of a block
_RESIDENT = 2  # blocks that a multiprocessor has at a time
_GROUPED = 4  # sixteens of columns of a group from which a warp may take two tiles
_COST = {2: 1.8, 1: 1.0}  # of a block, by tiles, the first of equals is taken; reasoned from instructions, not measured
_BYTE_SCALES = 4  # rows whose scales of one byte are read at a time


def takes(m: int, operands: Operands) -> bool:
    """Whether the kernel is for so many tokens and such a weight."""
    return m <= MOST and (operands.scale.dtype.itemsize > 1 or operands.scale.shape[1] % _BYTE_SCALES == 0)


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor, *, plain: bool) -> None:
    """Write rows [M, K] times the weight, and bias [N], into out [.., N]. plain: codes are bytes, not words128."""
    (m, k), n = rows.shape, out.shape[-1]
    tiles = _tiles(n, operands.sixteens, target_of(rows.device).processors)
    name = (
        f"lowbit::words_gemv<lowbit::{operands.code}, {HALVES[rows.dtype]}, lowbit::{operands.scale_kind}, "
        f"{operands.has_zero}, lowbit::{'kBytes' if plain else 'kWords'}, {operands.sixteens}, {tiles}, {_WARPS}>"
    )
    arguments = [
        rows, operands.codes, operands.scale, operands.zero, operands.alpha, operands.alpha_kind, bias, out, m, n, k,
        operands.blocks_a_group,
    ]  # fmt: skip
    kernels.launch(_SOURCE, name, rows.device, -(-n // (STEP * tiles)), 32 * _WARPS, arguments)


def _tiles(n: int, sixteens: int, processors: int) -> int:
    """Tiles of 16 rows of a warp: two share a load of x, one makes blocks of which processors have more nearly as many.

    Two need groups of 64 columns, for registers, and blocks enough that every processor has loads under way.
    """
    if sixteens < _GROUPED or ceil_div(n, 2 * STEP * processors) < _RESIDENT:
        return 1
    return min(_COST, key=lambda tiles: ceil_div(n, STEP * tiles * processors) * _COST[tiles])
