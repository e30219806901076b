"""gguf_rows16: blocks of GGUF files in strips of 16 rows, their words interleaved, for the native kernels. Version 1.

part           plain                   here
qdata          [N, row bytes]          int32 [S, words + F]: one strip of 16 rows after the other
any other      as it was               as it was

S = ceil(N / 16), and rows of zeros fill the last strip. A strip of blocks of c columns has three sections:

    words     [K / c, W, 16]  int32    the W words of a block: all bytes that no other section has, in their order
    halves    [K / c, H, 16]  float16  the H scales of the block
    bytes     [K / c, 16]     uint8    the scale of the block, where that is a byte (MXFP4)

then zeros up to a multiple of 64 bytes, and F = 16 S - N words of zeros, so that N can be read off the shape. A vector
load takes the same columns of 4, 8 or 16 rows, which of plain blocks have to be gathered at every product. A strip has
as many bytes as its rows have in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts.base import Layout, register_layout

NAME = "gguf_rows16"
VERSION = 1
ROWS = 16
_WORD = 4  # bytes
_LINE = 64
# Where the float16 of a block's header begin, and its scale of a byte; whatever else a block holds is whole words.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (), "NVFP4": (),
}  # fmt: skip
_BYTE = {"MXFP4": 0}
_UNITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
Interleaver = Callable[[GgufBlock, Tensor], Tensor]
Separator = Callable[[GgufBlock, Tensor, int, int], Tensor]


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] cannot be arranged like this, in words that follow its shape, or None."""
    assert isinstance(fmt, GgufBlock)
    if fmt.type not in _HALVES:
        return f"has blocks of the type {fmt.type}; {NAME} holds {', '.join(_HALVES)}"
    return None if k else "has no columns"


def packed_shape(n: int, row_bytes: int) -> tuple[int, int]:
    """The shape of the packed blocks of n rows."""
    strips = -(-n // ROWS)
    return strips, _strip_bytes(row_bytes) // _WORD + strips * ROWS - n


def rows(fmt: Format, parts: Mapping[str, Tensor]) -> int:
    """N of packed parts."""
    strips, width = parts["qdata"].shape
    return int(strips * ROWS - width % (_LINE // _WORD))


def row_bytes(fmt: GgufBlock, packed: Tensor) -> int:
    """The bytes of a row of plain blocks, of packed ones."""
    width = packed.shape[1] - packed.shape[1] % (_LINE // _WORD)
    return width * _WORD // ROWS // fmt.block.size * fmt.block.size  # what fills up is less than a block of every row


def shapes(fmt: Format, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the packed parts of a weight [n, k]."""
    made = dict(fmt.part_shapes(n, k))
    made["qdata"] = packed_shape(n, made["qdata"][1])
    return made


def interleave(fmt: GgufBlock, codes: Tensor) -> Tensor:
    """uint8 [n, row bytes] -> packed int32 blocks."""
    n, size = codes.shape
    strips, width = packed_shape(n, size)
    blocks = F.pad(codes, (0, 0, 0, -n % ROWS)).view(strips, ROWS, size // fmt.block.size, fmt.block.size)
    sections = [
        blocks[..., at].unflatten(-1, (-1, unit)).permute(0, 2, 3, 1, 4).reshape(strips, -1)
        for at, unit in _sections(fmt, codes.device)
    ]
    out = codes.new_zeros((strips, width * _WORD))
    out[:, : size * ROWS] = torch.cat(sections, dim=1)
    return out.view(torch.int32)


def separate(fmt: GgufBlock, packed: Tensor, n: int, size: int) -> Tensor:
    """The inverse of `interleave`: uint8 [n, size]."""
    strips, count = packed.shape[0], size // fmt.block.size
    flat = packed.contiguous().view(torch.uint8)
    blocks = flat.new_empty((strips, ROWS, count, fmt.block.size))
    begin = 0
    for at, unit in _sections(fmt, packed.device):
        end = begin + ROWS * count * at.numel()
        section = flat[:, begin:end].reshape(strips, count, at.numel() // unit, ROWS, unit)
        blocks[..., at] = section.permute(0, 3, 1, 2, 4).flatten(-2)
        begin = end
    return blocks.view(strips * ROWS, size)[:n].contiguous()


def look_up(fmt: GgufBlock, packed: Tensor, indices: Tensor) -> Tensor:
    """The plain blocks uint8 [count, row bytes] of the rows that indices, integers [count], name; they are unchecked.

    Only those rows are read: a table that is the head of a model as well is packed, and never unpacked for a lookup.
    """
    size = fmt.block.size
    count = row_bytes(fmt, packed) // size
    strips, lanes = indices.long() // ROWS, indices.long() % ROWS
    blocks = packed.new_empty((indices.numel(), count, size), dtype=torch.uint8)
    flat, begin = packed.view(torch.uint8), 0
    for at, unit in _sections(fmt, packed.device) if indices.numel() else ():
        end = begin + ROWS * count * at.numel()
        section = flat[:, begin:end].view(_UNITS[unit]).unflatten(1, (count, -1, ROWS))
        blocks[..., at] = section[strips, :, :, lanes].view(torch.uint8)
        begin = end
    return blocks.flatten(1)


def pack(fmt: Format, parts: Mapping[str, Tensor], interleaver: Interleaver = interleave) -> Parts:
    """Plain parts -> this arrangement. Raises `PartsError` for what it cannot hold."""
    assert isinstance(fmt, GgufBlock)
    codes = parts["qdata"]
    if why := refuses(fmt, *codes.shape):
        raise PartsError(f"a weight that {why} cannot be stored in {NAME}; keep it in plain parts")
    return {**parts, "qdata": interleaver(fmt, codes)}


def unpack(fmt: Format, parts: Mapping[str, Tensor], separator: Separator = separate) -> Parts:
    """The inverse of `pack`, bit for bit."""
    assert isinstance(fmt, GgufBlock)
    packed = parts["qdata"]
    return {**parts, "qdata": separator(fmt, packed, rows(fmt, parts), row_bytes(fmt, packed))}


def _strip_bytes(row_bytes: int) -> int:
    """The bytes of a strip without what tells N."""
    return -(-ROWS * row_bytes // _LINE) * _LINE


def _sections(fmt: GgufBlock, device: torch.device) -> list[tuple[Tensor, int]]:
    """Of each section the bytes of a block that it holds, int64, and how many of them stay together."""
    halves = [at + byte for at in _HALVES[fmt.type] for byte in (0, 1)]
    byte = [_BYTE[fmt.type]] if fmt.type in _BYTE else []
    words = [at for at in range(fmt.block.size) if at not in halves and at not in byte]
    assert len(words) % _WORD == 0
    found = ((words, _WORD), (halves, 2), (byte, 1))
    return [(torch.tensor(at, device=device), unit) for at, unit in found if at]


register_layout(
    Layout(NAME, VERSION, ("gguf",), pack, unpack, refuses, stored=False, rows=rows, shapes=shapes, alignment=_WORD)
)
