"""A linear whose weight has a scale per tile: products of 8-bit codes, block by block along K."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.numerics.groups import ceil_div, row_chunks

_ROWS = 1 << 22  # elements of a piece of activations or results as float32: 16 MiB


def linear_blocks(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    tile: tuple[int, int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]],
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """x [..., K], codes [N, K] with a scale per tile of (rows, columns): [ceil(N / rows), ceil(K / columns)].

    Every row of x is quantized on its own in each block of `columns` (1 x columns groups) by `quantize`, which gives
    codes and scales [M, 1]; the blocks' scaled products are summed in float32 from left to right.
    """
    k, n = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, k)
    out = torch.empty((rows.shape[0], n), dtype=out_dtype, device=x.device)
    for start, stop in row_chunks(rows.shape[0], max(n, k), elements=_ROWS):
        total = torch.zeros((stop - start, n), dtype=torch.float32, device=x.device)
        for block in range(ceil_div(k, tile[1])):
            left, right = block * tile[1], min((block + 1) * tile[1], k)
            codes, row_scale = quantize(rows[start:stop, left:right])
            columns = scale[:, block].repeat_interleave(tile[0])[:n]
            total += product(codes, weight[:, left:right]).float().mul_(row_scale * columns)
        out[start:stop] = total if bias is None else total.add_(bias.float())
    return out.reshape(*x.shape[:-1], n)
