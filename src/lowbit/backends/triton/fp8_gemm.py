"""Products of float8_e4m3fn codes with scales of rows, or of blocks of columns, in float32.

    out[m, n] = sum over blocks of (sum over k in block of a[m, k] * w[n, k]) * (scale_a[m] * scale_w[n])  + bias[n]

NVIDIA GPUs from compute capability 8.9 on multiply the codes as they are. Tensor cores of Ada and Hopper keep about 14
bits of a sum, so the sums of 128 columns at a time are added in float32 registers. Elsewhere codes are decoded to
float16, which holds them exactly. The weight is the left operand: its rows fill the tall side of a tensor core however
few tokens there are. With few tokens K is split over programs, whose sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.split_sums import add_splits, splits_for
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned

_CHUNK = 128  # columns of one product, and of one sum within a tensor core
_SMALLEST_CHUNK = 32  # that a tensor core takes
_TALLEST = 128  # rows of the weight in a tile; the others divide it
_FEW = 16  # tokens up to which the smallest tile is the only sensible one
_BAND = tl.constexpr(8)
_FIRST_WITH_E4M3 = (8, 9)
# Major compute capabilities whose tensor cores have memory of their own for sums, said to be whole float32: nobody has
# measured that here.
_FULL_SUMS = (10, 11)
_SPILLS = 64 * 128  # elements of a tile above which registers spill where codes are decoded, or sums are read back


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller, without spills."""
    wanted = max(_FEW, min(arguments["m_bucket"], 128))
    if not arguments["NATIVE"] or (arguments["BLOCKS"] and not arguments["PROMOTE"]):
        configs = [one for one in configs if one.constants["BLOCK_M"] * one.constants["BLOCK_N"] <= _SPILLS]
    return [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted] or list(configs[:1])


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=5),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=5),
        config(BLOCK_M=32, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=4),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=4),
    ],
    key=("m_bucket", "n", "k", "per_block", "splits", "CHUNK", "BLOCKS", "out"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _fp8_gemm(
    a, w, a_scale, w_scale, bias, out, m, m_bucket, n, k, columns, per_block, scale_rows, scale_columns,
    splits: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, ONE_SCALE: tl.constexpr,
    ROW_SCALE: tl.constexpr, NATIVE: tl.constexpr, PROMOTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Programs that run side by side share tokens, _BAND tiles of them, and rows of the weight.
    tiles_n, tiles_m = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    band = tile // (_BAND * tiles_n)
    height = tl.minimum(tiles_m - band * _BAND, _BAND)
    within = tile - band * _BAND * tiles_n
    tokens = (band * _BAND + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = within // height * BLOCK_N
    rows = top + tl.arange(0, BLOCK_N)
    # Rows and tokens beyond the last repeat the first: no mask in the loop.
    row, token = tl.where(rows < n, rows, 0), tl.where(tokens < m, tokens, 0)
    step = tl.arange(0, CHUNK)
    w_at = w + row[:, None].to(tl.int64) * k + step[None, :]
    a_at = a + token[None, :].to(tl.int64) * k + step[:, None]
    chunks = tl.cdiv(k, columns) * per_block
    first = chunks * split // splits
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in range(first, chunks * (split + 1) // splits):
        if EVEN:
            at = chunk * CHUNK
            left, right = tl.load(w_at + at), tl.load(a_at + at)
        else:
            inside = chunk % per_block * CHUNK
            at = chunk // per_block * columns + inside
            width = tl.minimum(columns - inside, k - at)
            left = tl.load(w_at + at, mask=(step < width)[None, :], other=0.0)
            right = tl.load(a_at + at, mask=(step < width)[:, None], other=0.0)
        if not NATIVE:
            left, right = _half(left), _half(right)
        if BLOCKS:
            block = chunk // per_block
            factor = tl.load(a_scale + block.to(tl.int64) * m + token)[None, :]
            if ONE_SCALE:
                factor *= tl.load(w_scale + top // scale_rows * scale_columns + block)
            else:
                factor = factor * tl.load(w_scale + row // scale_rows * scale_columns + block)[:, None]
            sums = tl.fma(tl.dot(left, right), tl.broadcast_to(factor, sums.shape), sums)
        elif PROMOTE:
            sums += tl.dot(left, right, max_num_imprecise_acc=CHUNK)  # without it, the two are made one again
        else:
            sums = tl.dot(left, right, sums)
    if not BLOCKS:
        factor = tl.load(a_scale + token)[None, :]
        if ROW_SCALE:
            sums *= factor * tl.load(w_scale + row)[:, None]
        else:
            sums *= factor * tl.load(w_scale)
    if splits == 1 and bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[:, None]
    at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(tokens < m)[None, :] & (rows < n)[:, None])


@triton.jit
def _half(code):
    """uint8 codes of float8_e4m3fn -> float16, exactly."""
    wide = code.to(tl.int16)
    # Its bits, moved by seven, are a float16 2**8 times too small.
    value = (((wide & 127) << 7) | ((wide & 128) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 127) == 127, float("nan"), value).to(tl.float16)


def multiplies_e4m3(target: device.Target) -> bool:
    """Whether the tensor cores of a target take e4m3 codes: NVIDIA's from 8.9 on."""
    return target.kind == "cuda" and target.capability >= _FIRST_WITH_E4M3


def product(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, tile: tuple[int, int] | None,
    bias: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """codes [M, K], weight [N, K] in float8_e4m3fn, bias [N] or None -> out [..., N] of M rows. M is not 0.

    tile None: scale [1, M], weight_scale [], or [N, 1]. (rows, columns): scale [ceil(K / columns), M], weight_scale
    [ceil(N / rows), ceil(K / columns)].
    """
    (m, k), n = codes.shape, weight.shape[0]
    target = device.target_of(codes.device)
    tall, columns = tile or (n, k)
    columns = min(columns, k)
    chunk = min(_CHUNK, max(_SMALLEST_CHUNK, triton.next_power_of_2(columns)))
    per_block, blocks = triton.cdiv(columns, chunk), triton.cdiv(k, columns)
    splits = splits_for(m, n, blocks * per_block, target, decodes=not multiplies_e4m3(target))
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
    native = multiplies_e4m3(target)
    if not native:
        codes, weight = codes.view(torch.uint8), weight.view(torch.uint8)
    _fp8_gemm(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]) * triton.cdiv(m, meta["BLOCK_M"]) * splits,),
        codes.device, a=codes, w=weight, a_scale=scale, w_scale=weight_scale, bias=bias, out=sums, m=m,
        m_bucket=bucket(m), n=n, k=k, columns=columns, per_block=per_block, scale_rows=tall, scale_columns=blocks,
        splits=splits, CHUNK=chunk, EVEN=k % chunk == 0 and columns % chunk == 0, BLOCKS=tile is not None,
        ONE_SCALE=tall % _TALLEST == 0, ROW_SCALE=weight_scale.numel() > 1, NATIVE=native,
        PROMOTE=native and target.capability[0] not in _FULL_SUMS,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, None, bias, out)
