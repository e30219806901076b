"""int4_plain_mm for few tokens: the weights are read once, four products an instruction (W4A8 decode).

Where x is small every block of warps rounds it for itself, while its first weights are on their way: one launch does it
all. Else a kernel of its own rounds x first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.int4_plain_operands import DTYPES, LOWEST, Operands, pieces_of, shift_of
from lowbit.backends.gpu import target_of
from lowbit.numerics.w4a8 import BLOCK

MOST = 8  # tokens that the kernel can take
FUSED = 24 * 1024  # values of x up to which every block rounds it for itself; reasoned, not measured

_SOURCE = "int4_plain_mm.cu"
_WARPS = 8  # of a block
_THREADS = 32 * _WARPS
_ROWS = {2: 4, 4: 4, 8: 2}  # of a warp, by tokens: more of them share a load of x, fewer need fewer registers
_RESIDENT = {4: 3, 2: 5}  # for one token, by rows of a warp: blocks of warps that a processor holds at a time
_ROWS_OF_PIECES = 2  # of a warp where a block of columns has several groups
_BLOCKS_A_PROCESSOR = 2  # of warps, below which warps share the columns of a row; reasoned, not measured
_WIDE = 8  # tokens between the scales of two blocks, as the kernel has them
_UNIT = 16.0  # what the kernel's sums of codes are multiplied by


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor, *, native: bool = False) -> None:
    """rows [M, K] of at most 8 tokens times the weight -> out [M, N]; `native`: scale and zero are [K/g, N]."""
    (m, k), n = rows.shape, operands.qdata.shape[0]
    blocks, pieces, tokens = k // BLOCK, pieces_of(operands.group), 1 << (m - 1).bit_length()
    fused = m * k <= FUSED
    rounded: tuple[Tensor | None, ...] = (None, None)
    if not fused:
        rounded = round_blocks(rows, pieces, _WIDE, _UNIT)
    taken = _rows(n, tokens, target_of(rows.device).processors) if pieces == 1 else _ROWS_OF_PIECES
    split = _split(n, blocks, taken, rows.device)
    name = (
        f"lowbit::int4_rows<lowbit::{DTYPES[rows.dtype]}, lowbit::{DTYPES[operands.scale.dtype]}, "
        f"{str(operands.zero is not None).lower()}, {tokens}, {taken}, {split}, {pieces}, {str(fused).lower()}, "
        f"{str(native).lower()}>"
    )
    kernels.launch(
        _SOURCE, name, rows.device, -(-n // (_WARPS // split * taken)), _THREADS,
        [rows, *rounded, operands.qdata, operands.scale, operands.zero, bias, out, m, n, blocks,
         shift_of(operands.group)],
        shared=m * blocks * (BLOCK + 4 + 4 * pieces) if fused else 0,
    )  # fmt: skip


def round_blocks(rows: Tensor, pieces: int, wide: int, unit: float) -> tuple[Tensor, Tensor]:
    """rows [M, K] -> codes int8 [M, K], and their scales and sums, float32 [K/32, 1 + pieces, wide], of tokens below M.

    Of each 32 columns the codes of the even ones come first. The sums are over `pieces` groups in them, times `unit`.
    """
    (m, k), device = rows.shape, rows.device
    codes = torch.empty((m, k), dtype=torch.int8, device=device)
    steps = torch.empty((k // BLOCK, 1 + pieces, wide), dtype=torch.float32, device=device)
    name = f"lowbit::round_blocks<lowbit::{DTYPES[rows.dtype]}, {pieces}>"
    kernels.launch(
        _SOURCE, name, device, -(-m * k // (LOWEST * _THREADS)), _THREADS,
        [rows, codes, steps, unit, m, k // BLOCK, wide],
    )  # fmt: skip
    return codes, steps


def _rows(n: int, tokens: int, processors: int) -> int:
    """Rows of a warp. For one token those with which the last round of blocks leaves the fewest processors idle."""
    if tokens > 1:
        return _ROWS[tokens]

    def filled(taken: int) -> float:
        rounds = n / (processors * _RESIDENT[taken] * _WARPS * taken)
        return rounds / math.ceil(rounds) if rounds > 1 else 1.0

    return max(_RESIDENT, key=filled)  # the first of equals


def _split(n: int, blocks: int, taken: int, device: torch.device) -> int:
    """How many warps share a row: more of them where there are too few rows to keep every processor busy."""
    wanted, split = _BLOCKS_A_PROCESSOR * target_of(device).processors, 1
    while split < _WARPS and 32 * split < blocks and n * split < wanted * _WARPS * taken:
        split *= 2
    return split
