"""The blocks of GGUF files: where scales and codes lie in them, and what they mean.

    w = level * step + zero        level: what a code stands for; one step (and zero) for every `unit` columns

A block is a run of bytes that holds the codes of some columns of one row, and in its other bytes, the header, what
steps and zeros are made of. Codes are cut into bit fields, several to a byte: a field of `bits` with `run` gives the
element `(c, s, r)` of a block, in row-major order, the bits `[s * bits, (s + 1) * bits)` of byte `c * run + r`.

The arithmetic is that of ggml, operation by operation, so values are equal to its own bit for bit. (The layouts are
stated in its ggml-common.h, the arithmetic by dequantize_row_* in ggml-quants.c.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.numerics.floats import e2m1_codes, e2m1_values, round_to_e2m1
from lowbit.numerics.gguf_headers import (
    FOUR_BITS,
    SIGNED_BYTES,
    SIGNED_SIX_BITS,
    SIX_BITS,
    Shared,
    Steps,
    one_half,
    power,
    two_halves,
    unsigned_e4m3,
)
from lowbit.numerics.levels import FloatLevels, IntegerLevels, Levels

# ggml's number of a type -> its name, the columns of a block, its bytes.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
_SIZES = {name: (columns, size) for name, columns, size in GGML_TYPES.values()}

E2M1_DOUBLED = FloatLevels(1, 1, 12.0)  # ggml doubles these values and halves their scale


@dataclass(frozen=True)
class Field:
    """Bits of the codes: bytes [start, stop) of a block, `bits` of them above the lowest `shift`."""

    start: int
    stop: int
    bits: int
    run: int
    shift: int = 0

    def read(self, blocks: Tensor) -> Tensor:
        """uint8 [B, columns], shifted to where they belong."""
        raw = blocks[:, self.start : self.stop]
        if self.bits == 8:
            return raw
        runs = raw.reshape(-1, (self.stop - self.start) // self.run, 1, self.run)
        pieces = (runs >> self._shifts(blocks).view(1, 1, -1, 1)) & ((1 << self.bits) - 1)
        return pieces.flatten(1) << self.shift

    def write(self, blocks: Tensor, codes: Tensor) -> None:
        """Put the bits of `codes` (uint8 [B, columns]) into blocks."""
        pieces = (codes >> self.shift) & ((1 << self.bits) - 1)
        runs = pieces.reshape(codes.shape[0], (self.stop - self.start) // self.run, 8 // self.bits, self.run)
        shifted = runs << self._shifts(blocks).view(1, 1, -1, 1)
        blocks[:, self.start : self.stop] = shifted.sum(dim=2, dtype=torch.uint8).flatten(1)

    def _shifts(self, like: Tensor) -> Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.uint8, device=like.device)


@dataclass(frozen=True)
class BlockType:
    """One type of block. `steps`: header uint8 [B, h] -> steps float32 [B, columns / unit], and zeros or None."""

    name: str
    unit: int
    header: tuple[tuple[int, int], ...]
    """The ranges of bytes that are no codes."""
    fields: tuple[Field, ...]
    steps: Callable[[Tensor], Steps]
    levels: Levels
    offset: int = 0
    """The code of level 0, where levels are integers in the order of the codes."""
    shared: Shared | None = None
    """How steps are stored on two levels, of the K-quants; None where each stands for itself."""

    @property
    def columns(self) -> int:
        """The columns of a block."""
        return _SIZES[self.name][0]

    @property
    def size(self) -> int:
        """The bytes of a block."""
        return _SIZES[self.name][1]

    @property
    def header_size(self) -> int:
        """The bytes of a block that are no codes."""
        return sum(stop - start for start, stop in self.header)

    def headers(self, blocks: Tensor) -> Tensor:
        """uint8 [B, size] -> [B, header_size]."""
        return torch.cat([blocks[:, start:stop] for start, stop in self.header], dim=1)

    def codes(self, blocks: Tensor) -> Tensor:
        """uint8 [B, size] -> uint8 [B, columns], one code a byte."""
        first, *rest = (field.read(blocks) for field in self.fields)
        for piece in rest:
            first = first | piece
        return first

    def join(self, codes: Tensor, headers: Tensor) -> Tensor:
        """The inverse of `codes` and `headers`: uint8 [B, size]."""
        blocks = torch.empty((codes.shape[0], self.size), dtype=torch.uint8, device=codes.device)
        for field in self.fields:
            field.write(blocks, codes)
        self.put_headers(blocks, headers)
        return blocks

    def put_headers(self, blocks: Tensor, headers: Tensor) -> None:
        """Write headers [B, header_size] into blocks [B, size]."""
        at = 0
        for start, stop in self.header:
            blocks[:, start:stop] = headers[:, at : at + stop - start]
            at += stop - start

    def values(self, codes: Tensor) -> Tensor:
        """The levels that codes (uint8, any shape) stand for, float32."""
        if isinstance(self.levels, FloatLevels):
            return e2m1_values(codes).mul_(2.0).add_(0.0)  # a negative zero is a positive one to ggml
        if self.offset:
            return codes.float().sub_(self.offset)
        return (codes.view(torch.int8) if self.fields[0].bits == 8 else codes).float()

    def nearest(self, levels: Tensor) -> Tensor:
        """uint8 codes of the levels nearest to float32 values, which are overwritten; half goes to even."""
        if isinstance(self.levels, FloatLevels):
            return e2m1_codes(round_to_e2m1(levels.mul_(0.5)).add_(0.0))
        whole = self.levels.round_(levels).add_(self.offset)
        return whole.to(torch.int8).view(torch.uint8) if self.fields[0].bits == 8 else whole.to(torch.uint8)

    def decode(self, codes: Tensor, headers: Tensor) -> Tensor:
        """float32 [B, columns] of codes [B, columns] and headers [B, header_size]."""
        step, zero = self.steps(headers)
        out = self.values(codes).view(codes.shape[0], step.shape[1], self.unit).mul_(step.unsqueeze(-1))
        return (out if zero is None else out.add_(zero.unsqueeze(-1))).flatten(1)


def block_type(name: str) -> BlockType:
    """The type of that name, one of `READABLE`."""
    return _types()[name]


READABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4")


@cache
def _types() -> dict[str, BlockType]:
    signed4, signed5 = IntegerLevels(-8, 7), IntegerLevels(-16, 15)
    four, five = IntegerLevels(0, 15), IntegerLevels(0, 31)
    found = (
        BlockType("Q4_0", 32, ((0, 2),), (Field(2, 18, 4, 16),), one_half, signed4, 8),
        BlockType("Q4_1", 32, ((0, 4),), (Field(4, 20, 4, 16),), two_halves, four),
        BlockType("Q5_0", 32, ((0, 2),), (Field(6, 22, 4, 16), Field(2, 6, 1, 1, 4)), one_half, signed5, 16),
        BlockType("Q5_1", 32, ((0, 4),), (Field(8, 24, 4, 16), Field(4, 8, 1, 1, 4)), two_halves, five),
        BlockType("Q8_0", 32, ((0, 2),), (Field(2, 34, 8, 32),), one_half, IntegerLevels(-127, 127)),
        _of_shared("Q2_K", 16, ((0, 16), (80, 84)), (Field(16, 80, 2, 32),), FOUR_BITS, IntegerLevels(0, 3)),
        _of_shared(
            "Q3_K",
            16,
            ((96, 110),),
            (Field(32, 96, 2, 32), Field(0, 32, 1, 32, 2)),
            SIGNED_SIX_BITS,
            IntegerLevels(-4, 3),
            4,
        ),
        _of_shared("Q4_K", 32, ((0, 16),), (Field(16, 144, 4, 32),), SIX_BITS, four),
        _of_shared("Q5_K", 32, ((0, 16),), (Field(48, 176, 4, 32), Field(16, 48, 1, 32, 4)), SIX_BITS, five),
        _of_shared(
            "Q6_K",
            16,
            ((192, 210),),
            (Field(0, 128, 4, 64), Field(128, 192, 2, 32, 4)),
            SIGNED_BYTES,
            IntegerLevels(-32, 31),
            32,
        ),
        BlockType("MXFP4", 32, ((0, 1),), (Field(1, 17, 4, 16),), power, E2M1_DOUBLED),
        BlockType("NVFP4", 16, ((0, 4),), (Field(4, 36, 4, 8),), unsigned_e4m3, E2M1_DOUBLED),
    )
    return {kind.name: kind for kind in found}


def _of_shared(
    name: str,
    unit: int,
    header: tuple[tuple[int, int], ...],
    fields: tuple[Field, ...],
    shared: Shared,
    levels: Levels,
    offset: int = 0,
) -> BlockType:
    """A type whose units share a float16."""
    return BlockType(name, unit, header, fields, shared.steps, levels, offset, shared)
