"""What the kernels for gguf are told of a weight: its blocks as they lie in the file, or in gguf_rows16."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, address, check_found, dtype_code, refuses_result
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.layouts import gguf_rows16

# The types with a kernel; the place of each is its number for `with_type` of native/gguf_blocks.h.
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4", "Q3_K")


class Blocks:
    """Blocks [N, row bytes] as they lie in the file, whose rows may have gaps between them, or in gguf_rows16.

    It holds what its addresses point to. See `Operands` for why it is one object and not a function for each of these.
    """

    __slots__ = ("_held", "n", "place", "scale")

    place: tuple[int, int, int, bool]
    """What a kernel is told: the place of the type in `TYPES`, the address, the bytes from one row (or strip) to the
    next, and whether it is strips."""
    scale: int
    """The address of the scale of all blocks, 0 for none."""
    n: int
    """Rows."""

    def __init__(self, fmt: GgufBlock, parts: Parts, *, packed: bool, first: int = 0) -> None:
        """first: the row to begin with, of packed blocks one that begins a strip."""
        codes, scale = parts["qdata"], parts.get("global_scale")
        self.n = (gguf_rows16.rows(fmt, parts) if packed else codes.shape[0]) - first
        if first:
            codes = codes[first // (gguf_rows16.ROWS if packed else 1) :]
        codes = codes if codes.stride(-1) == 1 else codes.contiguous()
        self.place = (TYPES.index(fmt.type), codes.data_ptr(), codes.stride(0) * codes.element_size(), packed)
        self.scale = 0 if scale is None else scale.data_ptr()
        self._held = (codes, scale)


def refuses_type(fmt: GgufBlock) -> str | None:
    """Why blocks of this type cannot be read here, or None."""
    if fmt.type not in TYPES:
        return f"blocks of the type {fmt.type}; the kernels take {', '.join(TYPES)}"
    return None


def refuses(fmt: GgufBlock, dtype: torch.dtype, k: int) -> str | None:
    """Why rows of k columns cannot be decoded here to a dtype, or None."""
    return refuses_type(fmt) or refuses_result(dtype) or (None if k else "no columns; the decoder takes whole blocks")


def decode(
    fmt: GgufBlock, parts: Parts, k: int, dtype: torch.dtype, indices: Tensor | None, shape: tuple[int, ...], *,
    packed: bool = False, rows: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The rows that indices name, or all of them -> `shape` in `dtype`. Raises `IndexError` for one that is none.

    packed: of parts in gguf_rows16, where no indices are known. rows: start and stop, for these and not all; of packed
    ones the start is a multiple of 16.
    """
    blocks = Blocks(fmt, parts, packed=packed, first=rows[0] if rows else 0)
    count = rows[1] - rows[0] if rows else blocks.n
    out = memory.empty(shape, dtype)
    indices = None if indices is None else indices.contiguous()
    columns = parts["pre_quant_scale"].contiguous() if fmt.pre_quant_scale else None
    wrong = native.module().dequantize_gguf(
        *blocks.place, blocks.n, k, address(indices), indices is not None and indices.dtype == torch.int64, 0,
        count if indices is None else indices.numel(), blocks.scale, address(columns), dtype_code(columns),
        out.data_ptr(), DTYPES[dtype], native.threads(),
    )  # fmt: skip
    if indices is not None:
        check_found(indices, wrong, blocks.n)
    return out
