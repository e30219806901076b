"""svdquant_fragments: 4-bit codes of svdquant_w4a4 as the lanes of a warp hold them for products of 4 bits. Version 1.

part             plain           here
qdata            [N, K/2] bytes  uint8 [ceil(N/64), K/64, 4, 32, 16]: block of 64 rows, group, 16 rows, lane, 16 bytes
any other part   as it was       as it was; scale [K/64, N] tells N

Of 16 rows and a group of 64 columns, which is 32 bytes of each row, lane 4 o + p holds four words of 4 bytes: bytes
4 p .. 4 p + 3 of row o and of row o + 8, then bytes 16 + 4 p .. + 3 of the same rows. These are the four registers of
an operand of 16 rows and 64 columns of int4 as they are; and the low nibbles, moved up, and the high ones are operands
of int8 with the 32 even and the 32 odd columns. So a lane loads 16 bytes, a warp 512 side by side, and nothing is moved
between lanes. Rows are padded with codes of zero to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts.base import Layout, register_layout
from lowbit.numerics.groups import ceil_div, pad_to, row_chunks

NAME = "svdquant_fragments"
VERSION = 1
FORMATS = ("svdquant_w4a4",)
ROWS = 64  # of a block
GROUP = 64  # columns
TILE = (4, 32, 16)  # of a block and group: sixteens of rows, lanes, bytes
_BYTES = GROUP // 2  # of a row in a group


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] cannot be arranged like this, or None: whatever the format takes."""
    return None


def gather(codes: Tensor) -> Tensor:
    """Bytes [64 B, K/2] -> [B, K/64, 4, 32, 16]."""
    blocks, groups = codes.shape[0] // ROWS, codes.shape[1] // _BYTES
    split = codes.view(blocks, 4, 2, 8, groups, 2, 4, 4)  # block, sixteen, eight, owner, group, half, place, byte
    return split.permute(0, 4, 1, 3, 6, 5, 2, 7).reshape(blocks, groups, *TILE)


def scatter(fragments: Tensor) -> Tensor:
    """The inverse of `gather`: bytes [64 B, K/2]."""
    blocks, groups = fragments.shape[:2]
    split = fragments.reshape(
        blocks, groups, 4, 8, 4, 2, 2, 4
    )  # block, group, sixteen, owner, place, half, eight, byte
    return split.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(blocks * ROWS, groups * _BYTES)


def pack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """Plain parts -> this arrangement, in bounded memory. Raises `PartsError` for parts in another one."""
    codes = parts["qdata"]
    if codes.dim() != 2:
        raise PartsError(f"qdata has shape {list(codes.shape)}, expected [N, K / 2]: the plain parts of {NAME}")
    n, width = codes.shape
    shape = (ceil_div(n, ROWS), width // _BYTES, *TILE)
    fragments = torch.empty(shape, dtype=torch.uint8, device=codes.device)
    for start, stop in row_chunks(n, 2 * width, ROWS):
        padded = pad_to(codes[start:stop].view(torch.uint8), ceil_div(stop - start, ROWS) * ROWS, width)
        fragments[start // ROWS : ceil_div(stop, ROWS)] = gather(padded.contiguous())
    return {name: fragments if name == "qdata" else part for name, part in parts.items()}


def unpack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """The inverse of `pack`, bit for bit. Raises `PartsError` for parts that are not in this arrangement."""
    fragments, (groups, n) = parts["qdata"], parts["scale"].shape
    expected = (ceil_div(n, ROWS), groups, *TILE)
    if fragments.dtype != torch.uint8 or tuple(fragments.shape) != expected:
        kind = f"{str(fragments.dtype).removeprefix('torch.')} {list(fragments.shape)}"
        raise PartsError(f"qdata is {kind}, expected uint8 {list(expected)}: not in {NAME}")
    codes = torch.empty((n, groups * _BYTES), dtype=torch.uint8, device=fragments.device)
    for start, stop in row_chunks(n, groups * GROUP, ROWS):
        codes[start:stop] = scatter(fragments[start // ROWS : ceil_div(stop, ROWS)])[: stop - start]
    plain = codes.view(fmt.rules[0].dtypes[0])
    return {name: plain if name == "qdata" else part for name, part in parts.items()}


def rows(fmt: Format, parts: Mapping[str, Tensor]) -> int:
    """N of packed parts: of the codes, some may be padding."""
    return parts["scale"].shape[1]


def shapes(fmt: Format, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the packed parts of a weight [n, k]."""
    plain = {name: tuple(shape) for name, shape in fmt.part_shapes(n, k).items()}
    return {**plain, "qdata": (ceil_div(n, ROWS), k // GROUP, *TILE)}


register_layout(
    Layout(NAME, VERSION, FORMATS, pack, unpack, refuses, stored=False, rows=rows, shapes=shapes, alignment=16)
)
