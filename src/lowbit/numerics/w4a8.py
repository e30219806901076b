"""4-bit weights times activations rounded to int8 on the fly, in blocks of 32 along K (ExecuTorch's int4_plain_mm).

    activations, by row and block:  d = amax / 127,  a = clamp(round_half_even(x / d), -128, 127)      no zero point
    y[m, n] = sum over blocks b of  scale * d * (sum of q * a  -  zero * sum of a)

The two inner sums are over columns of one block that share a weight's scale, and are exact integers: 15 * 128 * 32 is
far below 2**24. Because the sum of activations is kept apart, `zero` need not be an integer. All else is float32, as in
llama.cpp's Q4_1 x Q8_1. Source: pytorch/executorch#20038, `int4_plain_mm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.packing import unpack_nibbles

BLOCK = 32
LARGEST = 127
_PIECE = 1 << 22  # elements of any float32 temporary: 16 MiB


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], K a multiple of 32 -> int8 codes [M, K] and float32 scales [M, K/32].

    The reciprocal of the scale multiplies, as in the kernels; a block of zeros gives zeros. A block with a NaN or an
    infinity gets a scale that is not finite, so that results are not finite either.
    """
    blocks = x.float().unflatten(1, (-1, BLOCK))
    amax = blocks.abs().amax(dim=-1)
    scale = amax.div_(divisor(LARGEST, amax))
    inverse = scale.reciprocal()
    inverse.masked_fill_(~inverse.isfinite(), 0.0)  # also where 1 / d overflows: d is then below 2**-128
    codes = (blocks * inverse.unsqueeze(-1)).round_().nan_to_num_(0.0).clamp_(-LARGEST - 1, LARGEST)
    return codes.to(torch.int8).flatten(1), scale


def w4a8_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    """x [M, K] times a weight [N, K] -> [M, N] in the dtype of x, cast once.

    qdata: [N, K/2] bytes, codes 0..15, the even column low. scale, zero: [N, K/group_size]. bias: [N] or None.
    """
    m, n, width = x.shape[0], qdata.shape[0], min(group_size, BLOCK)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    for first, last in row_chunks(m, x.shape[1], elements=_PIECE):
        codes, steps = quantize_blocks(x[first:last])
        left = codes.float().unflatten(1, (-1, width)).transpose(0, 1)  # [K/width, M, width]
        steps = steps.t().repeat_interleave(BLOCK // width, dim=0)  # [K/width, M]
        for start, stop in row_chunks(n, max(x.shape), elements=_PIECE):
            right = unpack_nibbles(qdata[start:stop]).float().unflatten(1, (-1, width)).permute(1, 2, 0)
            repeat = group_size // width
            by_piece = [part[start:stop].float().t().repeat_interleave(repeat, dim=0) for part in (scale, zero)]
            total = _summed(left, steps, right, by_piece[0], by_piece[1])
            out[first:last, start:stop] = total if bias is None else total.add_(bias[start:stop].float())
    return out


def _summed(left: Tensor, steps: Tensor, right: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The sum over pieces p of scale * steps * (left @ right - zero * sum of left): float32 [M, N].

    left: [P, M, w]. steps: [P, M]. right: [P, w, N]. scale, zero: [P, N]. Summed from left to right, as many pieces at
    a time as a bounded temporary holds.
    """
    pieces, m, n = left.shape[0], left.shape[1], right.shape[2]
    total = torch.zeros((m, n), dtype=torch.float32, device=left.device)
    if not m or not n:
        return total
    sums = left.sum(dim=-1)
    at_once = max(1, _PIECE // (m * n))
    for first in range(0, pieces, at_once):
        some = slice(first, min(first + at_once, pieces))
        products = torch.bmm(left[some], right[some])
        products.sub_(zero[some].unsqueeze(1) * sums[some].unsqueeze(2))
        products.mul_(scale[some].unsqueeze(1) * steps[some].unsqueeze(2))
        for product in products:  # one order of summation, however the pieces are cut
            total += product
    return total
