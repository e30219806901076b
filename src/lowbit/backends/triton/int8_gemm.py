"""Products of int8 codes, scaled: out[m, n] = (sum over k of a[m, k] * b[n, k]) * (row[m] * scale[n]) + bias[n].

Sums are int32 in the tensor cores; scales, bias and the one rounding follow in float32, in eager's order, so that the
result is eager's, bit for bit. With few tokens K is split over programs, whose int32 sums a second kernel adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.split_sums import splits_for
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned

MOST_COLUMNS = (1 << 17) - 1  # more could overflow an int32
_FEW = 16  # tokens up to which the smallest tile is the only sensible one
_MANY = 256  # tokens in the largest tile
_BAND = tl.constexpr(8)  # tiles of weight rows that one after the other share the same tokens in the L2 cache
_WIDE = 256  # weight rows in the largest tile
_STEP = 128  # columns
_OLDEST = (8, 0)
WORD = 4  # bytes that have to lie together to be copied without passing through registers


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller.

    Rows that lie on odd addresses are read byte by byte, by the last one, which leaves registers for that.
    """
    if arguments["EVEN"] < WORD:
        return configs[-1:]
    large = arguments["LARGE"]
    wanted = max(_FEW, min(arguments["m_bucket"], _MANY if large else _MANY // 2))
    widest = _WIDE if large and arguments["splits"] == 1 else _WIDE // 2
    return [
        one
        for one in configs[:-1]
        if wanted // 2 <= one.constants["BLOCK_M"] <= wanted and one.constants["BLOCK_N"] <= widest
    ]


def has_large_tiles(target: device.Target) -> bool:
    """Whether sums of 256 x 128 fit beside operands: those need no registers on Hopper and data-center Blackwell."""
    return target.kind == "cuda" and target.capability[0] in (9, 10)


def pieces_of(m: int, n: int, k: int, target: device.Target, *, decodes: bool = False) -> int:
    """Into how many pieces to cut K, a power of two: see `split_sums.splits_for`."""
    return splits_for(m, n, k // (2 * _STEP), target, decodes=decodes)


def refuses(x: Tensor, k: int) -> str | None:
    """Why codes of `k` columns cannot be multiplied on the device of x, or None."""
    if k > MOST_COLUMNS:
        return f"{k} columns; sums of more than {MOST_COLUMNS} products could overflow an int32"
    target = device.target_of(x.device)
    if target.kind == "cuda" and target.capability < _OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (target.capability, _OLDEST))
        return f"the GPU has compute capability {have}; Triton multiplies int8 from {need} on"
    return None


def even(k: int) -> int:
    """The largest power of two, up to 1024, that divides k: whether the last step needs a mask is known beforehand."""
    return min(k & -k, 1024) if k else 1024


@triton.jit
def tile_of(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile of this program as (tile of weight rows, tile of tokens), in bands for the L2 cache."""
    program = tl.program_id(0)
    across, down = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    band = program // (_BAND * down)
    first = band * _BAND
    height = tl.minimum(across - first, _BAND)
    inside = program % (_BAND * down)
    return first + inside % height, inside // height


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=256, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, BLOCK_K=128, warps=4, stages=5),
        config(BLOCK_M=16, BLOCK_N=128, BLOCK_K=256, warps=4, stages=3),
        config(BLOCK_M=32, BLOCK_N=128, BLOCK_K=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, warps=4, stages=4),
        config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, warps=8, stages=3),
        config(BLOCK_M=256, BLOCK_N=128, BLOCK_K=128, warps=8, stages=3),
        config(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, warps=8, stages=4),
        config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, warps=8, stages=1),
    ],
    key=("m_bucket", "n", "k", "splits", "out"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _int8_gemm(
    a, b, row, scale, bias, out, m, m_bucket, n, k, splits: tl.constexpr, ROW_SCALE: tl.constexpr, EVEN: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weight is the left operand, so that 16 tokens fill an instruction. With splits > 1 out is int32 sums.

    EVEN: what `even` says of k. LARGE: what `has_large_tiles` says, for the choice of configs.
    """
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
    steps = tl.cdiv(k, BLOCK_K)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(steps * split // splits, steps * (split + 1) // splits):
        left = step * BLOCK_K
        if EVEN % BLOCK_K == 0:
            weight = tl.load(b_at + left)
            part = tl.load(a_at + left)
        else:
            weight = tl.load(b_at + left, mask=(column < k - left)[None, :], other=0)
            part = tl.load(a_at + left, mask=(column < k - left)[:, None], other=0)
        sums = tl.dot(weight, part, sums, out_dtype=tl.int32)
    present = (along <= last_token)[None, :] & (down <= last_row)[:, None]
    within = along.to(tl.int64)[None, :] * n + down[:, None]  # 256 tokens of 2**23 rows are more than 32 bits count
    at = out + (split.to(tl.int64) * m + first_token) * n + first_row + within
    if splits == 1:
        factor = tl.load(row + first_token + token_read)[None, :]
        if ROW_SCALE:
            factor *= tl.load(scale + first_row + row_read)[:, None]
        else:
            factor *= tl.load(scale)
        total = sums.to(tl.float32) * factor
        if bias is not None:
            total += tl.load(bias + first_row + row_read).to(tl.float32)[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=present)
    else:
        tl.store(at, sums, mask=present)


@tuned([config(BLOCK=1024, warps=4, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _add_int8_pieces(
    sums, row, scale, bias, out, m, n, SPLITS: tl.constexpr, ROW_SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sums int32 [SPLITS, M, N] -> out [M, N], a token a program along the second axis."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    inside = column < n
    total = tl.zeros((BLOCK,), tl.int32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (token + split * m.to(tl.int64)) * n + column, mask=inside, other=0)
    factor = tl.load(row + token)
    if ROW_SCALE:
        factors = factor * tl.load(scale + column, mask=inside, other=0.0)
    else:
        factors = factor * tl.load(scale)
    value = total.to(tl.float32) * factors
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * n + column, value.to(out.dtype.element_ty), mask=inside)


def product(a: Tensor, row: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes a [M, K] with scales `row` [M, 1], codes b [N, K] with one scale or N, bias [N] -> [M, N] in `dtype`.

    K is at most `MOST_COLUMNS`. `scale` is float32, `b` without gaps.
    """
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=a.device)
    if not m or not n:
        return out
    target = device.target_of(a.device)
    splits = pieces_of(m, n, k, target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.int32, device=a.device)
    row_scale = scale.numel() > 1
    _int8_gemm(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]) * triton.cdiv(m, meta["BLOCK_M"]), splits),
        a.device, a=a, b=b, row=row, scale=scale, bias=bias, out=sums, m=m, m_bucket=bucket(m), n=n, k=k,
        splits=splits, ROW_SCALE=row_scale, EVEN=even(k), LARGE=has_large_tiles(target),
    )  # fmt: skip
    if splits > 1:
        add_pieces(sums, row, scale, bias, out)
    return out


def add_pieces(sums: Tensor, row: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """int32 sums [S, M, N], row [M, 1], one scale or N, bias [N] -> out [M, N], as `product` ends."""
    splits, m, n = sums.shape
    _add_int8_pieces(
        lambda meta: (triton.cdiv(n, meta["BLOCK"]), m),
        sums.device, sums=sums, row=row, scale=scale, bias=bias, out=out, m=m, n=n, SPLITS=splits,
        ROW_SCALE=scale.numel() > 1,
    )  # fmt: skip
