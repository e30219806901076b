"""The linear for many tokens: the weight is decoded once, in pieces of bounded size, and PyTorch multiplies.

A launcher calls `product` where `refuses` gives no reason; it is registered for nothing itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.backends.triton import weight_rows
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks

ELEMENTS = 1 << 26  # of a decoded piece: 128 MiB in 16 bits


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, layout: str) -> str | None:
    """Why the weight cannot be decoded to the dtype of x, or None. Says nothing of x and bias."""
    return weight_rows.refuses(fmt, parts, x.dtype, layout)


def product(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, layout: str) -> Tensor:
    """x [..., K], parts plain (layout "") or in words128, bias [N] or None -> [..., N] in the dtype of x.

    The weight is rounded once to that dtype. `refuses` must have given no reason.
    """
    k = x.shape[-1]
    coded = weight_rows.describe(fmt, parts, k, layout)
    bias = None if bias is None else bias.to(x.dtype)
    if coded.n * k <= ELEMENTS:
        return F.linear(x, _rows(coded, x, 0, coded.n), bias)
    rows = x.reshape(-1, k)
    out = x.new_empty((rows.shape[0], coded.n))
    for start, stop in row_chunks(coded.n, k, elements=ELEMENTS):
        weight = _rows(coded, x, start, stop).t()
        if bias is None:
            torch.mm(rows, weight, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], rows, weight, out=out[:, start:stop])
    return out.view(*x.shape[:-1], coded.n)


def _rows(coded: weight_rows.Coded, x: Tensor, start: int, stop: int) -> Tensor:
    weight = x.new_empty((stop - start, coded.k))
    coded.decode(weight, start, stop)
    return weight
