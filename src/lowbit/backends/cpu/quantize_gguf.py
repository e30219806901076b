"""quantize and scale_search for the types of gguf that are made here.

Plain blocks of one step, or a step and a zero, are the reference's. They are searched as by the reference, and so are
K-quants, with sums in another order. NVFP4 blocks are weights of nvfp4 under a global scale of one, whose scales are
the best there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.gguf_recast import put_together
from lowbit.formats.nvfp4 import Nvfp4
from lowbit.formats.parts import Parts
from lowbit.numerics.gguf_blocks import GGML_TYPES
from lowbit.numerics.gguf_headers import Split
from lowbit.numerics.gguf_k_encode import EFFORTS
from lowbit.numerics.gguf_step_search import PASSES, TRIES
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.levels import IntegerLevels

_ELEMENTS = 1 << 22  # of a piece of rows of K-quants, whose codes are a byte each before they are packed
_NUMBERS = {name: number for number, (name, *_) in GGML_TYPES.items()}


def refuses_quantize(fmt: GgufBlock, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    """Why the encoders here do not take this weight, or None."""
    return _refuses_scale(fmt) or encoders.refuses_quantize(fmt, w, seed, where)


def refuses_search(fmt: GgufBlock, w: Tensor, weights: Tensor | None, where: str = "weight") -> str | None:
    """The same with weights of columns."""
    return _refuses_scale(fmt) or encoders.refuses_search(fmt, w, weights, where)


def _refuses_scale(fmt: GgufBlock) -> str | None:
    return None if fmt.encodable else "a scale of the whole weight; the kernel makes blocks without one"


@kernel("quantize", format="gguf", backend="cpu", refuses=refuses_quantize)
def quantize_gguf(fmt: GgufBlock, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts: blocks as ggml makes them or, of `SEARCHED`, of the least squared error that is found."""
    return _encoded(fmt, w, None, where, search=False)


@kernel("scale_search", format="gguf", backend="cpu", refuses=refuses_search)
def scale_search_gguf(fmt: GgufBlock, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts of the least weighted squared error that is found."""
    return _encoded(fmt, w, weights, where, search=True)


def _encoded(fmt: GgufBlock, w: Tensor, weights: Tensor | None, where: str, *, search: bool) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    if fmt.type != "NVFP4" and fmt.block.shared is None:
        finite = _step_blocks(fmt, source, columns, parts["qdata"], search=search)
        return encoders.finished(parts, source, where, finite=finite)
    for start, stop in row_chunks(n, k, elements=_ELEMENTS):
        rows = source[start:stop]
        blocks, finite = _nvfp4_blocks(rows, columns) if fmt.type == "NVFP4" else _k_blocks(fmt, rows, columns)
        encoders.finished(parts, source, where, finite=finite)
        parts["qdata"][start:stop] = blocks.view(stop - start, -1)
    return parts


def _step_blocks(fmt: GgufBlock, w: Tensor, columns: Tensor | None, qdata: Tensor, *, search: bool) -> bool:
    """Writes the blocks of one step, or a step and a zero, to `qdata`; whether the weight is finite."""
    tries = torch.tensor(TRIES.get(fmt.type, ()), dtype=torch.float32, device="cpu")
    finite: bool = native.module().quantize_gguf_steps(
        w.data_ptr(), DTYPES[w.dtype], *w.shape, _NUMBERS[fmt.type], search, address(columns), address(tries),
        tries.numel(), PASSES, qdata.data_ptr(), native.threads(),
    )  # fmt: skip
    return finite


def _k_blocks(fmt: GgufBlock, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, bool]:
    """Blocks uint8 [B, size] of some rows, and whether these are finite."""
    kind, effort = fmt.block, EFFORTS[fmt.type]
    assert kind.shared is not None
    assert isinstance(kind.levels, IntegerLevels)
    count, units = rows.numel() // kind.columns, kind.columns // kind.unit
    factors = torch.empty((2, count, 1), dtype=torch.float32, device="cpu")
    multiples = torch.empty((2, count, units), dtype=torch.float32, device="cpu")
    codes = torch.empty((count, kind.columns), dtype=torch.uint8, device="cpu")
    tries, tried = (torch.tensor(tried, dtype=torch.float32, device="cpu") for tried in (effort.tries, effort.factors))
    ends = (kind.levels.low, kind.levels.high, kind.offset, kind.shared.low, kind.shared.high)
    finite = native.module().quantize_gguf_k(
        rows.data_ptr(), DTYPES[rows.dtype], *rows.shape, address(columns), kind.unit, *map(float, ends),
        tries.data_ptr(), tries.numel(), effort.passes, tried.data_ptr(), tried.numel(), effort.rounds,
        effort.both_signs, factors[0].data_ptr(), factors[1].data_ptr(), multiples[0].data_ptr(),
        multiples[1].data_ptr(), codes.data_ptr(), native.threads(),
    )  # fmt: skip
    zeros = (None, None) if kind.shared.low else (factors[1], multiples[1])
    found = Split(factors[0], multiples[0], *zeros)
    return kind.join(codes, kind.shared.join(found)), finite


def _nvfp4_blocks(rows: Tensor, columns: Tensor | None) -> tuple[Tensor, bool]:
    """The same of NVFP4."""
    fmt = Nvfp4()
    n, k = rows.shape
    parts = fmt.empty_parts((n, k), rows.device)
    parts["global_scale"].fill_(1.0)
    finite = native.module().quantize_nvfp4(
        rows.data_ptr(), DTYPES[rows.dtype], n, k, False, False, True, address(columns), parts["qdata"].data_ptr(),
        parts["scale"].data_ptr(), parts["global_scale"].data_ptr(), True, native.threads(),
    )  # fmt: skip
    return put_together(fmt, parts, (n, k), "weight")["qdata"] if finite else parts["qdata"], finite
