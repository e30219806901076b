"""int4_plain_mm and the gradient of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends import coalesced_linear
from lowbit.dispatch import kernel
from lowbit.formats.base import DECODE_ELEMENTS
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


coalesced_linear.serve("eager", int4_plain_mm)
