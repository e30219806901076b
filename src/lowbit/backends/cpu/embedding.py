"""embedding for the formats that `dequantize` decodes: only the rows that are asked for, plain or in rows16."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import coded_rows, native
from lowbit.backends.cpu.operands import DTYPES, check_found
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

_ROTATED = 1e-6  # see dequantize


def refuses(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    if indices.dtype not in {torch.int64, torch.int32}:
        return f"indices are {str(indices.dtype).removeprefix('torch.')}; the kernel takes int64 and int32"
    return coded_rows.refuses(fmt, dtype)


def embedding(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    return _looked_up(fmt, indices, parts, k, dtype, packed=False)


def embedding_rows16(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...], parts in rows16 -> [..., K] in `dtype`."""
    return _looked_up(fmt, indices, parts, k, dtype, packed=True)


def _looked_up(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype, *, packed: bool) -> Tensor:
    weight = coded_rows.describe(fmt, parts, k, packed=packed)
    indices = indices.contiguous()
    out = memory.empty((*indices.shape, k), dtype)
    wrong = native.module().embedding(
        weight.address, indices.data_ptr(), indices.numel(), indices.dtype == torch.int64, out.data_ptr(),
        DTYPES[dtype], native.threads(),
    )  # fmt: skip
    check_found(indices, wrong, weight.n)
    return out


for _name in coded_rows.DECODED:
    _tolerance = _ROTATED if _name in coded_rows.ROTATED else 0.0
    for _layout, _run in (("", embedding), (rows16.NAME, embedding_rows16)):
        kernel("embedding", format=_name, backend="cpu", layout=_layout, refuses=refuses, tolerance=_tolerance)(_run)
