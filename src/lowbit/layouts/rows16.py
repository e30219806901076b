"""rows16: rows in blocks of 16, their words of codes interleaved, as the native CPU kernels read them. Version 1.

part               plain              here
qdata              [N, bytes]         int32 [B, 16 * W + F]: in block b, word w of row r is at 16 * w + r
a part along N     [N, ..], [.., N]   [B, G, 16], the same dtype: G values for each of 16 rows, 1 where there was one
any other part     as it was          as it was: what all rows share, and what more than one row shares (tiles)

B = ceil(N / 16), and rows of zeros fill the last block: F = 16 * B - N of them, which the F zeros at the end of each
block tell, so that N can be read off the shape. A vector load takes the same columns of 4, 8 or 16 rows; their scales
are a load, too, and a sum over columns stays in its lane.

A word is 4 bytes of a row, four columns of 8 bits or eight of 4. The codes of fp8 are interleaved by single bytes
(column c of row r at byte 16 * c + r), because they are decoded in half precision, not multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Part, Parts
from lowbit.layouts.base import Layout, register_layout

NAME = "rows16"
VERSION = 1
ROWS = 16
WORD = 4  # bytes
_UNITS = {1: torch.uint8, WORD: torch.int32}
_BYTEWISE = ("fp8_e4m3", "fp8_e5m2", "mxfp8")
FORMATS = (*_BYTEWISE, "awq_w4a16", "wna16", "nvfp4", "mxfp4", "int8", "svdquant_w4a4", "convrot_w4a4")


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] cannot be arranged like this, in words that follow its shape, or None."""
    config = fmt.config()
    if fmt.name in _BYTEWISE and fmt.rounds_input:
        return "rounds its input to fp8, which no kernel for this arrangement does"
    if config.get("act_order"):
        return "has columns whose groups are scattered (act_order)"
    if config.get("bits", 4) not in {4, 8}:
        return f"has codes of {config['bits']} bits, which cross the borders of bytes"
    columns = fmt.unit((n, k))[1]
    if k % columns:  # such parts are padded, and their shapes do not tell how far
        return f"has {k} columns, not a multiple of the group of {columns}"
    size = _row_bytes(fmt, n, k)
    return f"has rows of {size} bytes of codes, not a multiple of {WORD}" if size % WORD else None


def rows(fmt: Format, parts: Mapping[str, Tensor]) -> int:
    """N of packed parts."""
    blocks, size = parts["qdata"].shape
    return int(blocks * ROWS - size % ROWS)


def packed_shape(n: int, row_bytes: int) -> tuple[int, int]:
    """The shape of packed codes of n rows."""
    blocks = -(-n // ROWS)
    return blocks, row_bytes // WORD * ROWS + blocks * ROWS - n


def interleave(codes: Tensor, unit: int) -> Tensor:
    """uint8 [n, bytes] -> packed int32 codes; `unit`: bytes that stay together."""
    n, size = codes.shape
    blocks, width = packed_shape(n, size)
    padded = F.pad(codes, (0, 0, 0, -n % ROWS)).view(_UNITS[unit])
    out = codes.new_zeros((blocks, width), dtype=torch.int32)
    mixed = padded.view(blocks, ROWS, -1).transpose(1, 2).contiguous()
    out[:, : size // WORD * ROWS] = mixed.view(blocks, -1).view(torch.int32)
    return out


def separate(packed: Tensor, n: int, unit: int) -> Tensor:
    """The inverse of `interleave`: uint8 [n, bytes]."""
    blocks, width = packed.shape
    body = packed[:, : width - width % ROWS].contiguous().view(_UNITS[unit])
    rows = body.view(blocks, -1, ROWS).transpose(1, 2).reshape(blocks * ROWS, -1)
    return rows[:n].contiguous().view(torch.uint8)


def pack(fmt: Format, parts: Mapping[str, Tensor], interleaver: Callable[[Tensor, int], Tensor] = interleave) -> Parts:
    """Plain parts -> this arrangement. Raises `PartsError` for what it cannot hold."""
    codes = parts["qdata"].view(torch.uint8)
    n, k = fmt.rows_of(parts), _columns(fmt, codes.shape[1])
    if why := refuses(fmt, n, k):
        raise PartsError(f"a weight that {why} cannot be stored in {NAME}; keep it in plain parts")
    made = dict(parts)
    made["qdata"] = interleaver(codes, _unit(fmt))
    for rule in fmt.rules:
        if _is_by_row(rule):
            made[rule.name] = _by_block(_rows_first(rule, parts[rule.name])).view(parts[rule.name].dtype)
    return made


def unpack(
    fmt: Format, parts: Mapping[str, Tensor], separator: Callable[[Tensor, int, int], Tensor] = separate
) -> Parts:
    """The inverse of `pack`, bit for bit."""
    n = rows(fmt, parts)
    made = dict(parts)
    made["qdata"] = separator(parts["qdata"], n, _unit(fmt)).view(fmt.rules[0].dtypes[0])
    for rule in fmt.rules:
        if _is_by_row(rule):
            part = parts[rule.name]
            by_row = _bits(part).transpose(1, 2).reshape(part.shape[0] * ROWS, -1)[:n]
            made[rule.name] = _as_stored(rule, by_row).contiguous().view(part.dtype)
    return made


def shapes(fmt: Format, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the packed parts of a weight [n, k]."""
    blocks = -(-n // ROWS)
    made = dict(fmt.part_shapes(n, k))
    made["qdata"] = packed_shape(n, _row_bytes(fmt, n, k))
    for rule in fmt.rules:
        if _is_by_row(rule):
            values = torch.Size(made[rule.name]).numel() // n if n else 1
            made[rule.name] = (blocks, values, ROWS)
    return made


def _unit(fmt: Format) -> int:
    """Bytes of a row that stay together."""
    return 1 if fmt.name in _BYTEWISE else WORD


def _row_bytes(fmt: Format, n: int, k: int) -> int:
    rule = fmt.rules[0]
    return rule.shape(fmt.sizes(n, k))[1] * rule.dtypes[0].itemsize


def _columns(fmt: Format, row_bytes: int) -> int:
    """K of plain codes whose rows are this long."""
    return row_bytes * 8 // int(fmt.config().get("bits", 8 if _row_bytes(fmt, 16, 64) == 64 else 4))


def _is_by_row(rule: Part) -> bool:
    return rule.name != "qdata" and rule.row_axis is not None and rule.rows_per_entry == 1


def _bits(part: Tensor) -> Tensor:
    """A part as integers of its size: PyTorch pads and moves few of the small floats."""
    return part.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[part.element_size()])


def _rows_first(rule: Part, part: Tensor) -> Tensor:
    """The bits of a part along N as [N, G]."""
    bits = _bits(part.contiguous())
    axis = rule.row_axis
    assert axis is not None
    return bits.movedim(axis, 0).reshape(bits.shape[axis], -1)


def _as_stored(rule: Part, by_row: Tensor) -> Tensor:
    """[N, G] -> the axes of the rule."""
    if len(rule.dims) == 1:
        return by_row.reshape(-1)
    return by_row if rule.row_axis == 0 else by_row.t()


def _by_block(by_row: Tensor) -> Tensor:
    """[N, G] bits -> [B, G, 16]."""
    fill = -by_row.shape[0] % ROWS
    padded = F.pad(by_row, (0, 0, 0, fill)) if fill else by_row
    return padded.view(-1, ROWS, by_row.shape[1]).transpose(1, 2).contiguous()


register_layout(
    Layout(NAME, VERSION, FORMATS, pack, unpack, refuses, stored=False, rows=rows, shapes=shapes, alignment=4)
)
