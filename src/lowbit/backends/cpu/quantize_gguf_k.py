"""quantize and scale_search for the K-quants of gguf: the reference's search, with sums in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.numerics.gguf_headers import Split
from lowbit.numerics.gguf_k_encode import EFFORTS
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.levels import IntegerLevels

_ELEMENTS = 1 << 22  # of a piece of rows, whose codes are a byte each before they are packed


def refuses_quantize(fmt: GgufBlock, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    """Why the search here does not take this weight, or None."""
    return _refuses_type(fmt) or encoders.refuses_quantize(fmt, w, seed, where)


def refuses_search(fmt: GgufBlock, w: Tensor, weights: Tensor | None, where: str = "weight") -> str | None:
    """The same with weights of columns."""
    return _refuses_type(fmt) or encoders.refuses_search(fmt, w, weights, where)


def _refuses_type(fmt: GgufBlock) -> str | None:
    if fmt.type not in EFFORTS:
        return f"blocks of the type {fmt.type}; the kernel makes {', '.join(EFFORTS)}"
    return None if fmt.encodable else "a scale of the whole weight; the kernel makes blocks without one"


@kernel("quantize", format="gguf", backend="cpu", refuses=refuses_quantize)
def quantize_gguf_k(fmt: GgufBlock, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, of the least squared error that is found."""
    return _encoded(fmt, w, None, where)


@kernel("scale_search", format="gguf", backend="cpu", refuses=refuses_search)
def scale_search_gguf_k(fmt: GgufBlock, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts of the least weighted squared error that is found."""
    return _encoded(fmt, w, weights, where)


def _encoded(fmt: GgufBlock, w: Tensor, weights: Tensor | None, where: str) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    for start, stop in row_chunks(n, k, elements=_ELEMENTS):
        blocks, finite = _blocks(fmt, source[start:stop], columns)
        encoders.finished(parts, source, where, finite=finite)
        parts["qdata"][start:stop] = blocks.view(stop - start, -1)
    return parts


def _blocks(fmt: GgufBlock, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, bool]:
    """Blocks uint8 [B, size] of some rows, and whether these are finite."""
    kind, effort = fmt.block, EFFORTS[fmt.type]
    assert kind.shared is not None
    assert isinstance(kind.levels, IntegerLevels)
    count, units = rows.numel() // kind.columns, kind.columns // kind.unit
    factors = torch.empty((2, count, 1))
    multiples = torch.empty((2, count, units))
    codes = torch.empty((count, kind.columns), dtype=torch.uint8)
    tries, tried = torch.tensor(effort.tries), torch.tensor(effort.factors)
    finite = native.module().quantize_gguf_k(
        rows.data_ptr(), DTYPES[rows.dtype], *rows.shape, address(columns), kind.unit, kind.levels.low,
        kind.levels.high, kind.offset, kind.shared.low, kind.shared.high, tries.data_ptr(), tries.numel(),
        effort.passes, tried.data_ptr(), tried.numel(), effort.rounds, effort.neighbours, effort.both_signs,
        factors[0].data_ptr(), factors[1].data_ptr(), multiples[0].data_ptr(), multiples[1].data_ptr(),
        codes.data_ptr(), native.threads(),
    )  # fmt: skip
    zeros = (None, None) if kind.shared.low else (factors[1], multiples[1])
    found = Split(factors[0], multiples[0], *zeros)
    return kind.join(codes, kind.shared.join(found)), finite
