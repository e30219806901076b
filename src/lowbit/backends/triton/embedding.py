"""embedding for the formats that `dequantize` decodes: only the rows that are asked for.

An index that names no row gives a row of NaN: nothing is read for it, and to raise would make the caller wait for the
GPU. Negative indices name no row, as in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import weight_rows
from lowbit.backends.triton.dequantize import TOLERANCES
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128


def refuses(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return _refuses(fmt, indices, parts, dtype, "")


def refuses_words128(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return _refuses(fmt, indices, parts, dtype, words128.NAME)


def embedding(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    return _looked_up(fmt, indices, parts, k, dtype, "")


def embedding_words128(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...], parts in words128 -> [..., K] in `dtype`."""
    return _looked_up(fmt, indices, parts, k, dtype, words128.NAME)


def refuses_indices(indices: Tensor, parts: Parts) -> str | None:
    """Why rows cannot be looked up by these indices, or None."""
    if indices.dtype not in {torch.int64, torch.int32}:
        return f"indices are {str(indices.dtype).removeprefix('torch.')}; the kernel takes int64 and int32"
    if indices.device != parts["qdata"].device:
        return f"indices are on {indices.device}, the table on {parts['qdata'].device}; move one of them"
    return None


def _refuses(fmt: Format, indices: Tensor, parts: Parts, dtype: torch.dtype, layout: str) -> str | None:
    return refuses_indices(indices, parts) or weight_rows.refuses(fmt, parts, dtype, layout)


def _looked_up(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype, layout: str) -> Tensor:
    out = torch.empty((*indices.shape, k), dtype=dtype, device=indices.device)
    weight_rows.describe(fmt, parts, k, layout).look_up(out, indices)
    return out


for _name in weight_rows.FORMATS:
    kernel("embedding", format=_name, backend="triton", refuses=refuses, tolerance=TOLERANCES[_name])(embedding)
    if _name in words128.FORMATS:
        kernel(
            "embedding", format=_name, backend="triton", layout=words128.NAME, refuses=refuses_words128,
            tolerance=TOLERANCES[_name],
        )(embedding_words128)  # fmt: skip
