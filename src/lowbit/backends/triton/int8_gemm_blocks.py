"""The product of int8 codes with scales per block of columns: those of 1 x B blocks of a and of tiles of b.

    out[m, n] = sum over blocks of (sum over the block's k of a[m, k] * b[n, k]) * (row[m] * scale[n]) + bias[n]

The sum of a block is an exact int32; blocks are scaled and added in float32 from left to right, as eager does. With few
tokens the blocks are split over programs, whose float32 sums are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.int8_gemm import WORD, even, pieces_of, tile_of
from lowbit.backends.triton.split_sums import add_splits
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned

_STEPS = (32, 64, 128)  # columns of one product
_LARGEST_BLOCK = 1024
_FEW, _MANY = 16, 128  # tokens in the smallest and in the largest tile


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is near the number of tokens; the last one where rows lie on odd addresses."""
    if arguments["EVEN"] < WORD:
        return configs[-1:]
    wanted = max(_FEW, min(arguments["m_bucket"], _MANY))
    return [one for one in configs[:-1] if wanted // 2 <= one.constants["BLOCK_M"] <= wanted]


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=5),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=5),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=4),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=32, BLOCK_N=64, warps=8, stages=1),
    ],
    key=("m_bucket", "n", "k", "splits", "STEPS", "BLOCK_K", "out"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _int8_gemm_blocks(
    a, b, row, scale, bias, out, m, m_bucket, n, k, tall, splits: tl.constexpr, STEPS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block has STEPS * BLOCK_K columns, a tile of b `tall` rows. row [blocks, M]. With splits > 1 out is sums."""
    k = k // EVEN * EVEN  # tells the compiler how wide loads can be
    tile_n, tile_m = tile_of(m, n, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    first_row, first_token = tile_n.to(tl.int64) * BLOCK_N, tile_m.to(tl.int64) * BLOCK_M
    down, along = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)  # 32-bit offsets within the tile spare registers
    last_row, last_token = n - 1 - first_row.to(tl.int32), m - 1 - first_token.to(tl.int32)
    # What lies beyond the last row repeats it: no mask of rows in the loop.
    row_read, token_read = tl.minimum(down, last_row), tl.minimum(along, last_token)
    column = tl.arange(0, BLOCK_K)
    b_at = b + first_row * k + (row_read[:, None] * k + column[None, :])
    a_at = a + first_token * k + (token_read[None, :] * k + column[:, None])
    blocks = tl.cdiv(k, STEPS * BLOCK_K)
    scale_at = scale + ((first_row + row_read) // tall) * blocks
    row_at = row + first_token + token_read
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(blocks * split // splits, blocks * (split + 1) // splits):
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for step in tl.static_range(STEPS):
            left = (block * STEPS + step) * BLOCK_K
            if EVEN % (STEPS * BLOCK_K) == 0:
                weight = tl.load(b_at + left)
                part = tl.load(a_at + left)
            else:
                weight = tl.load(b_at + left, mask=(column < k - left)[None, :], other=0)
                part = tl.load(a_at + left, mask=(column < k - left)[:, None], other=0)
            sums = tl.dot(weight, part, sums, out_dtype=tl.int32)
        factor = tl.load(row_at + m.to(tl.int64) * block)[None, :] * tl.load(scale_at + block)[:, None]
        total += sums.to(tl.float32) * factor
    present = (along <= last_token)[None, :] & (down <= last_row)[:, None]
    within = along.to(tl.int64)[None, :] * n + down[:, None]  # 256 tokens of 2**23 rows are more than 32 bits count
    at = out + (split.to(tl.int64) * m + first_token) * n + first_row + within
    if splits == 1:
        if bias is not None:
            total += tl.load(bias + first_row + row_read).to(tl.float32)[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=present)
    else:
        tl.store(at, total, mask=present)


def refuses_block(columns: int) -> str | None:
    """Why blocks of so many columns cannot be multiplied, or None."""
    if columns & (columns - 1) or not _STEPS[0] <= columns <= _LARGEST_BLOCK:
        return f"blocks of {columns} columns; the kernel takes powers of two from {_STEPS[0]} to {_LARGEST_BLOCK}"
    return None


def product(
    a: Tensor, row: Tensor, b: Tensor, scale: Tensor, tile: tuple[int, int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Codes a [M, K] with `row` [M, K / columns], b [N, K] with one scale a tile (rows, columns) -> [M, N] in `dtype`.

    `row` is stored as its transpose; b and scale [ceil(N / rows), ceil(K / columns)] are without gaps.
    """
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=a.device)
    if not m or not n:
        return out
    step = min(tile[1], _STEPS[-1])
    splits = pieces_of(m, n, k, device.target_of(a.device))
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=a.device)
    _int8_gemm_blocks(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]) * triton.cdiv(m, meta["BLOCK_M"]), splits),
        a.device, a=a, b=b, row=row, scale=scale, bias=bias, out=sums, m=m, m_bucket=bucket(m), n=n, k=k,
        tall=tile[0], splits=splits, STEPS=tile[1] // step, EVEN=even(k), BLOCK_K=step,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, None, bias, out)
    return out
