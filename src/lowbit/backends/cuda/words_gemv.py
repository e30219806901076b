"""4-bit codes and up to 8 tokens of 16 bits: weights are read once whatever the number of tokens, in one launch."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.words_operands import HALVES, STEP, Operands
from lowbit.backends.gpu import target_of

MOST = 8  # tokens
_SOURCE = "words_gemv.cu"
_WARPS = 8  # of a block
_WAVES = 4  # blocks for each multiprocessor that make larger tiles worth while; reasoned, not measured
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
    """Tiles of 16 rows a warp: more of them share a load of x, fewer make more blocks and need fewer registers."""
    return 2 if sixteens > 2 and n >= _WAVES * processors * 2 * STEP else 1
