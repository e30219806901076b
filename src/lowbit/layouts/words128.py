"""words128: 4-bit codes in words that GPU kernels decode without moving a bit between threads. Version 1.

part             plain                here
qdata            [N, K/2] bytes       int32 [N, K/8]: nibble j of word i in a block of 128 columns is column 16 j + i
a part by group  [N, G] or [G, N]     [G, N], the same dtype: the values of neighbouring rows lie side by side
any other part   as it was            as it was

A thread of a tensor-core operand holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16. Here these are neighbouring words,
and each gives it the same columns of all eight sixteens: two loads of 8 bytes feed eight products, where bytes in the
order of the columns take sixteen loads of one byte, and a permutation each. Measured in the compiled code for Hopper:
3.5 instructions a code against 5.8 and 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Part, Parts
from lowbit.layouts.base import Layout, register_layout
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

NAME = "words128"
VERSION = 1
FORMATS = ("awq_w4a16", "wna16", "nvfp4", "mxfp4")
COLUMNS = 128  # of a block
_NIBBLES = 8  # in a word
_WORDS = COLUMNS // _NIBBLES  # in a block


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] cannot be arranged like this, in words that follow its shape, or None."""
    config = fmt.config()
    if config.get("act_order"):
        return "has columns whose groups are scattered (act_order)"
    if config.get("bits", 4) != 4:
        return f"has codes of {config['bits']} bits, not of 4"
    return f"has {k} columns, not a multiple of {COLUMNS}" if k % COLUMNS else None


def interleave(codes: Tensor) -> Tensor:
    """uint8 codes [n, K] in 0..15 -> int32 words [n, K/8]."""
    n, k = codes.shape
    nibbles = codes.view(n, k // COLUMNS, _NIBBLES, _WORDS).to(torch.int32)
    words = torch.zeros_like(nibbles[:, :, 0])
    for j in range(_NIBBLES):
        words |= nibbles[:, :, j] << (4 * j)
    return words.view(n, k // _NIBBLES)


def separate(words: Tensor) -> Tensor:
    """The inverse of `interleave`: uint8 codes [n, K]."""
    n, width = words.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).view(1, 1, _NIBBLES, 1)
    blocks = words.view(n, width // _WORDS, 1, _WORDS)
    return ((blocks >> shifts) & 0xF).to(torch.uint8).view(n, width * _NIBBLES)


def pack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """Plain parts -> this arrangement, in bounded memory. Raises `PartsError` for what it cannot hold."""
    codes = parts["qdata"]
    n, k = codes.shape[0], 2 * codes.shape[1]
    if why := refuses(fmt, n, k):
        raise PartsError(f"a weight [{n}, {k}] {why}, so it cannot be in {NAME}")
    words = torch.empty((n, k // _NIBBLES), dtype=torch.int32, device=codes.device)
    for start, stop in row_chunks(n, k):
        words[start:stop] = interleave(unpack_nibbles(codes[start:stop].view(torch.uint8)))
    return {**_turned(fmt, parts), "qdata": words}


def unpack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """The inverse of `pack`, bit for bit. Raises `PartsError` for parts that are not in this arrangement."""
    words = parts["qdata"]
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] % _WORDS:
        kind = f"{str(words.dtype).removeprefix('torch.')} {list(words.shape)}"
        raise PartsError(f"qdata is {kind}, expected int32 [N, K / 8] with K a multiple of {COLUMNS}: not in {NAME}")
    n, k = words.shape[0], words.shape[1] * _NIBBLES
    codes = torch.empty((n, k // 2), dtype=torch.uint8, device=words.device)
    for start, stop in row_chunks(n, k):
        codes[start:stop] = pack_nibbles(separate(words[start:stop]))
    return {**_turned(fmt, parts), "qdata": codes.view(fmt.rules[0].dtypes[0])}


def rows(fmt: Format, parts: Mapping[str, Tensor]) -> int:
    """N of packed parts."""
    return parts["qdata"].shape[0]


def shapes(fmt: Format, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the packed parts of a weight [n, k]."""
    found = {name: tuple(shape) for name, shape in fmt.part_shapes(n, k).items()}
    turned = {rule.name: found[rule.name][::-1] for rule in fmt.rules if rule.name in found and _is_by_row(rule)}
    return {**found, **turned, "qdata": (n, k // _NIBBLES)}


def _turned(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """The parts with those by group [N, G] as [G, N], or back: the same move both ways."""
    return {
        rule.name: parts[rule.name].t().contiguous() if _is_by_row(rule) else parts[rule.name]
        for rule in fmt.rules
        if rule.name in parts
    }


def _is_by_row(rule: Part) -> bool:
    """Whether a part is [N, G], whose neighbours along a row belong to one row of the weight."""
    return rule.name != "qdata" and len(rule.dims) == 2 and rule.row_axis == 0


register_layout(
    Layout(NAME, VERSION, FORMATS, pack, unpack, refuses, stored=False, rows=rows, shapes=shapes, alignment=16)
)
