"""int4_plain_mm, the gradient of its input, and the generic ops over weights in its arrangement.

The generic ops take the plain parts out of it: what a format means does not depend on how a kernel wants it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.eager.linear_input_gradient import linear_input_gradient
from lowbit.dispatch import kernel
from lowbit.formats.base import DECODE_ELEMENTS, Format
from lowbit.formats.parts import Parts
from lowbit.layouts import coalesced_int4
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.packing import unpack_nibbles
from lowbit.numerics.w4a8 import w4a8_linear


@kernel("int4_plain_mm", backend="eager")
def int4_plain_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K], bytes [N, K/2], scale and zero [N, K/g], bias [N] or None -> [..., N] in the dtype of x."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return w4a8_linear(rows, qdata, scale, zero, group_size, bias).reshape(*x.shape[:-1], qdata.shape[0])


@kernel("int4_plain_mm_input_gradient", backend="eager")
def int4_plain_mm_input_gradient(grad: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """grad [..., N], bytes [N, K/2], scale and zero [N, K/g] -> [..., K] in the dtype of grad."""
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    total = torch.zeros((*grad.shape[:-1], k), dtype=torch.float32, device=grad.device)
    for start, stop in row_chunks(n, k, elements=DECODE_ELEMENTS):
        codes = unpack_nibbles(qdata[start:stop]).float().unflatten(1, (-1, group_size))
        weight = codes.sub_(zero[start:stop].float().unsqueeze(-1)).mul_(scale[start:stop].float().unsqueeze(-1))
        total += grad[..., start:stop].float() @ weight.flatten(1)
    return total.to(grad.dtype)


def _register(name: str) -> None:
    @kernel("linear", backend="eager", format=name, layout=coalesced_int4.NAME)
    def linear_coalesced_int4(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """x [..., K], bias [N] or None -> [..., N] in the dtype of x, activations left alone."""
        return fmt.linear(x, coalesced_int4.unpack(fmt, parts), bias)

    @kernel("dequantize", backend="eager", format=name, layout=coalesced_int4.NAME)
    def dequantize_coalesced_int4(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`."""
        return fmt.dequantize(coalesced_int4.unpack(fmt, parts), shape, dtype)

    @kernel("embedding", backend="eager", format=name, layout=coalesced_int4.NAME)
    def embedding_coalesced_int4(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
        """[...] -> rows [..., K] in `dtype`."""
        return fmt.embedding(indices, coalesced_int4.unpack(fmt, parts), k, dtype)

    @kernel("linear_input_gradient", backend="eager", format=name, layout=coalesced_int4.NAME)
    def linear_input_gradient_coalesced_int4(fmt: Format, grad: Tensor, parts: Parts, k: int) -> Tensor:
        """grad [..., N] -> [..., K] in the dtype of grad."""
        return linear_input_gradient(fmt, grad, coalesced_int4.unpack(fmt, parts), k)


for _format in ("awq_w4a16", "wna16"):
    _register(_format)
