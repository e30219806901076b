"""What the kernels for gguf are told of a weight: its blocks as they lie in the file."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, address, check_found, dtype_code, refuses_result
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts

# The types with a kernel; the place of each is its number for `with_type` of native/gguf_blocks.h.
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4")


class Blocks:
    """The plain parts of a weight: blocks uint8 [N, row bytes], whose rows may have gaps between them, and a scale."""

    __slots__ = ("codes", "global_scale", "n", "type")

    type: int
    """The number of the type: its place in `TYPES`."""
    codes: Tensor
    global_scale: Tensor | None
    """That of all blocks."""
    n: int
    """Rows."""

    def __init__(self, fmt: GgufBlock, parts: Parts) -> None:
        codes = parts["qdata"]
        self.type, self.global_scale, self.n = TYPES.index(fmt.type), parts.get("global_scale"), codes.shape[0]
        self.codes = codes if codes.stride(-1) == 1 else codes.contiguous()


def refuses_type(fmt: GgufBlock) -> str | None:
    """Why blocks of this type cannot be read here, or None."""
    if fmt.type not in TYPES:
        return f"blocks of the type {fmt.type}; the kernels take {', '.join(TYPES)}"
    return None


def refuses(fmt: GgufBlock, dtype: torch.dtype, k: int) -> str | None:
    """Why rows of k columns cannot be decoded here to a dtype, or None."""
    return refuses_type(fmt) or refuses_result(dtype) or (None if k else "no columns; the decoder takes whole blocks")


def decode(
    fmt: GgufBlock, parts: Parts, k: int, dtype: torch.dtype, indices: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """The rows that indices name, or all of them -> `shape` in `dtype`. Raises `IndexError` for one that is none."""
    blocks, out = Blocks(fmt, parts), memory.empty(shape, dtype)
    indices = None if indices is None else indices.contiguous()
    columns = parts["pre_quant_scale"].contiguous() if fmt.pre_quant_scale else None
    wrong = native.module().dequantize_gguf(
        blocks.type, blocks.codes.data_ptr(), blocks.codes.stride(0), blocks.n, k, address(indices),
        indices is not None and indices.dtype == torch.int64, 0, blocks.n if indices is None else indices.numel(),
        address(blocks.global_scale), address(columns), dtype_code(columns), out.data_ptr(), DTYPES[dtype],
        native.threads(),
    )  # fmt: skip
    if indices is not None:
        check_found(indices, wrong, blocks.n)
    return out
