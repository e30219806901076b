"""int4_plain_mm by tensor cores with int8: weights are read once for every 8 to 64 tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.int4_plain_few import round_blocks
from lowbit.backends.cuda.int4_plain_operands import DTYPES, Operands, pieces_of, shift_of
from lowbit.backends.gpu import target_of
from lowbit.numerics.groups import ceil_div, round_up
from lowbit.numerics.w4a8 import BLOCK

OLDEST = (8, 0)  # the first GPU with this product

_SOURCE = "int4_plain_tiles.cu"
_WARPS = 8  # of a block
_TOKENS = 64  # of the largest tile
_CHUNK = 4  # blocks of 32 columns that a warp multiplies in a step
_SHARED = 72 * 1024  # bytes of shared memory of a block: two or three blocks a processor, and less than any GPU has
_FEW_TILES = 2  # of 8 tokens up to which the weights' way from memory is what counts
_DEEPEST = 6  # steps of the pipeline
_BLOCKS_A_PROCESSOR = 2  # of warps, below which warps share the columns of their rows; reasoned, not measured
_AXIS = 65535  # blocks of the grid along its second axis
_BYTES = 1 << 31  # of the codes of x, which 32 bits have to count


@dataclass(frozen=True)
class Tile:
    """What a block of warps multiplies: tiles of 8 tokens, and 16 rows for each warp that the columns' teams have."""

    token_tiles: int
    row_warps: int
    pieces: int

    @property
    def split(self) -> int:
        """Teams of warps that share the columns."""
        return _WARPS // self.row_warps

    @property
    def rows(self) -> int:
        """Of the weight."""
        return 16 * self.row_warps

    @property
    def tokens(self) -> int:
        """Of x."""
        return 8 * self.token_tiles

    @property
    def stage(self) -> int:
        """Bytes of a step: codes of weights and of x, scales and sums of x."""
        return self.split * (self.rows * 64 + self.tokens * (128 + 4 * _CHUNK * (1 + self.pieces)))

    @property
    def stages(self) -> int:
        """Steps that fit, two at least; with many tokens two are enough, as each takes longer than a load."""
        return 2 if self.token_tiles > _FEW_TILES else max(2, min(_DEEPEST, _SHARED // self.stage))

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the stages, or in their place the sums."""
        return max(self.stages * self.stage, self.split * self.tokens * (self.rows + 4) * 4)


def tile_of(m: int, n: int, pieces: int, processors: int) -> Tile:
    """Few rows are shared out among more blocks, whose warps then share the columns."""
    token_tiles = min(_TOKENS // pieces, max(8, 1 << (m - 1).bit_length())) // 8  # several groups a block: registers
    most, least = (8, 4) if token_tiles > _FEW_TILES else (4, token_tiles)
    enough = _BLOCKS_A_PROCESSOR * processors
    while most > least and ceil_div(n, 16 * most) * ceil_div(m, 8 * token_tiles) < enough:
        most //= 2
    return Tile(token_tiles, most, pieces)


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor) -> None:
    """rows [M, K] times the weight -> out [M, N]."""
    tile = tile_of(rows.shape[0], out.shape[1], pieces_of(operands.group), target_of(rows.device).processors)
    at_once = min(_AXIS, max(1, _BYTES // (rows.shape[1] * tile.tokens))) * tile.tokens
    for first in range(0, rows.shape[0], at_once):
        _product(rows[first : first + at_once], operands, bias, out[first : first + at_once], tile)


def _product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    (m, k), n = rows.shape, out.shape[1]
    wide = round_up(m, tile.tokens)
    codes, steps = round_blocks(rows, tile.pieces, wide, 1.0)
    name = (
        f"lowbit::int4_tiles<lowbit::{DTYPES[rows.dtype]}, lowbit::{DTYPES[operands.scale.dtype]}, "
        f"{str(operands.zero is not None).lower()}, {tile.token_tiles}, {tile.row_warps}, "
        f"{tile.split}, {tile.pieces}, {tile.stages}>"
    )
    grid = (ceil_div(n, tile.rows), ceil_div(m, tile.tokens))
    kernels.launch(
        _SOURCE, name, rows.device, grid, 32 * _WARPS,
        [codes, steps, operands.qdata, operands.scale, operands.zero, bias, out, m, n, k // BLOCK,
         shift_of(operands.group), wide],
        shared=tile.shared,
    )  # fmt: skip
