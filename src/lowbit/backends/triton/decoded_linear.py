"""The linear for many tokens, and the gradient of any: the weight is decoded in pieces, and PyTorch multiplies.

Launchers call these where `refuses` gives no reason; nothing is registered here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.backends.triton import weight_rows
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks

ELEMENTS = 1 << 26  # of a decoded piece: 128 MiB in 16 bits


class Decodable(Protocol):
    """A weight [n, k] that can be decoded some rows at a time, such as `weight_rows.Coded`."""

    @property
    def n(self) -> int:
        """Rows."""
        ...

    @property
    def k(self) -> int:
        """Columns."""
        ...

    def decode(self, out: Tensor, start: int, stop: int) -> None:
        """Rows [start, stop) -> out [stop - start, K], contiguous, in its dtype."""
        ...


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, layout: str) -> str | None:
    """Why the weight cannot be decoded to the dtype of x, or None. Says nothing of x and bias."""
    return weight_rows.refuses(fmt, parts, x.dtype, layout)


def product(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, layout: str) -> Tensor:
    """x [..., K], parts plain (layout "") or in words128, bias [N] or None -> [..., N] in the dtype of x.

    The weight is rounded once to that dtype. `refuses` must have given no reason.
    """
    return product_of(weight_rows.describe(fmt, parts, x.shape[-1], layout), x, bias)


def product_of(coded: Decodable, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] or None -> [..., N] in the dtype of x, to which the weight is rounded once."""
    k = coded.k
    if not x.numel():  # no tokens: for nothing would the weight be decoded
        return x.new_empty((*x.shape[:-1], coded.n))
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


def input_gradient(fmt: Format, grad: Tensor, parts: Parts, k: int, layout: str) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad; several pieces of the weight are summed in float32."""
    return gradient_of(weight_rows.describe(fmt, parts, k, layout), grad)


def gradient_of(coded: Decodable, grad: Tensor) -> Tensor:
    """`input_gradient` of a weight that is described already."""
    k = coded.k
    if coded.n * k <= ELEMENTS:
        return grad @ _rows(coded, grad, 0, coded.n)
    total = grad.new_zeros((*grad.shape[:-1], k), dtype=torch.float32)
    for start, stop in row_chunks(coded.n, k, elements=ELEMENTS):
        total += grad[..., start:stop] @ _rows(coded, grad, start, stop)
    return total.to(grad.dtype)


def _rows(coded: Decodable, x: Tensor, start: int, stop: int) -> Tensor:
    weight = x.new_empty((stop - start, coded.k))
    coded.decode(weight, start, stop)
    return weight
