"""dequantize for the formats whose rows decode without a search, from plain parts and from rows16."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import coded_rows, native
from lowbit.backends.cpu.operands import DTYPES
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

# Every value is the reference's; but a rotation of the weight sums in another order than a matrix product.
_ROTATED = 1e-6


def refuses(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return coded_rows.refuses(fmt, dtype)


def dequantize(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    return _decoded(fmt, parts, shape, dtype, packed=False)


def dequantize_rows16(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts in rows16 -> the effective weight [N, K] in `dtype`."""
    return _decoded(fmt, parts, shape, dtype, packed=True)


def _decoded(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, *, packed: bool) -> Tensor:
    weight = coded_rows.describe(fmt, parts, shape[1], packed=packed)
    out = memory.empty(shape, dtype)
    native.module().dequantize(weight.address, 0, shape[0], out.data_ptr(), DTYPES[dtype], native.threads())
    return out


for _name in coded_rows.DECODED:
    _tolerance = _ROTATED if _name in coded_rows.ROTATED else 0.0
    for _layout, _run in (("", dequantize), (rows16.NAME, dequantize_rows16)):
        kernel("dequantize", format=_name, backend="cpu", layout=_layout, refuses=refuses, tolerance=_tolerance)(_run)
