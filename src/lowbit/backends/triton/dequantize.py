"""dequantize for the formats whose rows decode code by code, from plain parts and from words128."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import weight_rows
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

# Compilers for other GPUs than NVIDIA's may round the product and the sum of awq_w4a16 once instead of twice.
TOLERANCES = {name: 1e-6 if name == "awq_w4a16" else 0.0 for name in weight_rows.FORMATS}


def refuses(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return weight_rows.refuses(fmt, parts, dtype)


def refuses_words128(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return weight_rows.refuses(fmt, parts, dtype, words128.NAME)


def dequantize(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    return _decoded(fmt, parts, shape, dtype, "")


def dequantize_words128(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts in words128 -> the effective weight [N, K] in `dtype`."""
    return _decoded(fmt, parts, shape, dtype, words128.NAME)


def _decoded(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, layout: str) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=parts["qdata"].device)
    weight_rows.describe(fmt, parts, shape[1], layout).decode(out, 0, shape[0])
    return out


for _name in weight_rows.FORMATS:
    kernel("dequantize", format=_name, backend="triton", refuses=refuses, tolerance=TOLERANCES[_name])(dequantize)
    if _name in words128.FORMATS:
        kernel(
            "dequantize", format=_name, backend="triton", layout=words128.NAME, refuses=refuses_words128,
            tolerance=TOLERANCES[_name],
        )(dequantize_words128)  # fmt: skip
