"""Activations of svdquant_w4a4 in one kernel: smoothing, 4-bit codes by groups of 64, and the low rank's first product.

Codes and scales have eager's bits: quotients are IEEE's, rounding is to nearest, half to even. The low rank sees the
activations as they are, without smoothing and without the shift of unsigned codes. With few tokens K is split over
programs, which leave that many sums of the low rank.

A quotient takes three instructions: times the reciprocal of the divisor, which many elements share, and once corrected
by what is left, exact in a fused multiply-add. It differed from IEEE's in none of 3 * 10**8 random pairs; of the GPU's
own approximate reciprocal, which the correction starts from, that is still to be seen.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.device import Target
from lowbit.backends.triton.split_sums import add_splits
from lowbit.backends.triton.svdquant_gemm import padded_tokens
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.dispatch import kernel
from lowbit.numerics.groups import round_up
from lowbit.numerics.int4_matmul import GROUP

_FLOOR = tl.constexpr(struct.unpack("<i", struct.pack("<f", 1e-10))[0])  # the bits of the smallest absmax
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float of which the last bit is worth 1
_ROUND_BITS = tl.constexpr(0x4B400000)
_FEWEST, _MANY = 16, 512  # rows of the smallest tile, and how many are wanted for the larger ones
_ROWS = 32  # of the tile that is thought of in `_splits`
MOST_SPLITS = 16
_MOST_RANKS = 128  # of one program


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """The smallest tile where the product has no tensor cores, and for few tokens; the largest for many."""
    m = arguments["m_bucket"] if arguments["HALF"] else 1
    most = _FEWEST if m <= _FEWEST else 32 if m < _MANY else 64
    return [one for one in configs if most // 2 <= one.constants["BLOCK_M"] <= most]


@tuned(
    [
        config(BLOCK_M=16, warps=4, stages=3),
        config(BLOCK_M=32, warps=4, stages=3),
        config(BLOCK_M=64, warps=4, stages=3),
        config(BLOCK_M=64, warps=8, stages=3),
    ],
    key=("m_bucket", "k", "rank", "x", "splits", "PACKED", "HALF"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket", "rows_out"))
def _quantize(
    x, raw, smooth, down, codes, scale, low, m, m_bucket, rows_out, scale_rows, k, rank, splits: tl.constexpr,
    SHIFT: tl.constexpr, UNSIGNED: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr,
    ASSEMBLE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    writes = rows < tl.where(tl.program_id(2) == 0, rows_out, 0)  # of a long rank's programs the first writes codes
    present = (rows < m)[:, None]
    column, byte = tl.arange(0, 64), tl.arange(0, 32)
    at = rows[:, None].to(tl.int64) * k
    largest: tl.constexpr = 15 if UNSIGNED else 7
    groups = k // 64
    sums = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for group in range(groups * split // splits, groups * (split + 1) // splits):
        columns = group * 64 + column
        part = tl.load(x + at + columns[None, :], mask=present, other=0.0)
        factor = tl.load(smooth + columns).to(tl.float32)
        value = part.to(tl.float32)
        if SHIFT != 0:
            value += SHIFT
        off = (factor == 0) | (tl.abs(factor) == float("inf"))
        factor = tl.where(off, 1.0, factor)
        inverse = tl.where(off, 0.0, _reciprocal(factor, ASSEMBLE))  # a factor of 0 switches its channel off
        value = _divided(value, factor[None, :], inverse[None, :])
        # The largest of the bits is that of the magnitudes, and a NaN is larger than all of them.
        amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        amax = tl.maximum(amax, _FLOOR).to(tl.float32, bitcast=True)
        step = tl.div_rn(amax, tl.full((BLOCK_M,), 1.0 * largest, tl.float32))
        steps = _divided(value, step[:, None], _reciprocal(step, ASSEMBLE)[:, None])
        # Rounds half to even. What is finite is at most `largest` already; of the rest the scale is not finite, too.
        code = (steps + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
        if UNSIGNED:
            code = tl.maximum(code, 0)
        even, odd = tl.split(tl.reshape(code, (BLOCK_M, 32, 2)))
        if PACKED:
            even, odd = tl.where(present, even, 0), tl.where(present, odd, 0)
            step = tl.where(rows < m, step, 0.0)
            to = codes + rows[:, None].to(tl.int64) * (groups * 32) + group * 32 + byte[None, :]
            tl.store(to, ((even & 15) | (odd << 4)).to(tl.int8), mask=writes[:, None])
        else:
            to = codes + at + group * 64 + byte[None, :]
            tl.store(to, even.to(tl.int8), mask=writes[:, None])
            tl.store(to + 32, odd.to(tl.int8), mask=writes[:, None])
        tl.store(scale + tl.cast(group, tl.int64) * scale_rows + rows, step.to(scale.dtype.element_ty), mask=writes)
        if raw is not None:
            part = tl.load(raw + at + columns[None, :], mask=present, other=0.0)
        right = tl.load(down + columns[:, None] * rank + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        if HALF:
            sums = tl.dot(part, right, sums)
        else:
            sums = tl.dot(part.to(tl.float32), right.to(tl.float32), sums, input_precision="ieee")
    to = low + (split.to(tl.int64) * rows_out + rows[:, None]) * rank + ranks[None, :]
    tl.store(to, sums, mask=(rows < rows_out)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _reciprocal(divisor, ASSEMBLE: tl.constexpr):
    """1 / divisor, rounded to nearest but for one in a million."""
    if ASSEMBLE:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / divisor
    return tl.fma(tl.fma(-divisor, inverse, 1.0), inverse, inverse)


@triton.jit
def _divided(value, divisor, inverse):
    """value / divisor, rounded to nearest, given the divisor's reciprocal; both may be broadcast."""
    quotient = value * inverse
    left = tl.fma(tl.broadcast_to(-divisor, value.shape), quotient, value)
    return tl.fma(left, tl.broadcast_to(inverse, value.shape), quotient)


def _splits(m: int, groups: int, most: int, target: Target) -> int:
    """Into how many pieces to cut K: enough for two programs a processor, a power of two."""
    wanted = min(2 * target.processors // triton.cdiv(m, _ROWS), groups, most)
    return 1 << max(0, wanted.bit_length() - 1)


def _run(
    x: Tensor, raw: Tensor | None, smooth: Tensor, down: Tensor, codes: Tensor, scale: Tensor, rows: int, *,
    unsigned: bool, shift: float, packed: bool, most_splits: int = MOST_SPLITS,
) -> Tensor:  # fmt: skip
    """Fill codes and scale, and return the low rank's sums, float32 [S, rows, R]."""
    (m, k), rank, target = x.shape, down.shape[1], device.target_of(x.device)
    splits = _splits(m, k // GROUP, most_splits, target)
    low = torch.empty((splits, rows, rank), dtype=torch.float32, device=x.device)
    ranks = min(_MOST_RANKS, max(_FEWEST, triton.next_power_of_2(rank)))
    _quantize(
        lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]), splits, triton.cdiv(rank, ranks)),
        x.device, x=x, raw=raw, smooth=smooth.contiguous(), down=down.contiguous(), codes=codes, scale=scale, low=low,
        m=m, m_bucket=bucket(rows), rows_out=rows, scale_rows=scale.shape[1], k=k, rank=rank, splits=splits,
        SHIFT=shift, UNSIGNED=unsigned, PACKED=packed, RANKS=ranks, ASSEMBLE=target.assembles,
        HALF=(x if raw is None else raw).dtype == down.dtype and down.dtype.itemsize == 2,
    )  # fmt: skip
    return low


def quantized(
    x: Tensor, smooth: Tensor, down: Tensor, *, unsigned: bool, shift: float, most_splits: int = MOST_SPLITS
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> what `grouped_product` takes: codes in pairs' order, float32 scales, and float32 sums [S, M, R].

    The codes are those of (x + shift) / smooth; the sums, over S <= most_splits, are x @ down.
    """
    (m, k), padded = x.shape, padded_tokens(x.shape[0])
    codes = torch.empty((padded, k), dtype=torch.int8, device=x.device)
    scale = torch.empty((k // GROUP, padded), dtype=torch.float32, device=x.device)
    low = _run(
        x, None, smooth, down, codes, scale, m, unsigned=unsigned, shift=shift, packed=False, most_splits=most_splits
    )
    return codes, scale, low


def refuses_quantize(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses(x, smooth=smooth, lora_down=down, lora_x=lora_x)


@kernel("quantize_svdquant_w4a4", backend="triton", refuses=refuses_quantize, tolerance=1e-5)
def quantize_svdquant_w4a4(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> bytes [Mp, K/2], scales [K/64, Mp] in the dtype of x, low-rank activations float32 [Mp, R]."""
    (m, k), padded = x.shape, round_up(x.shape[0], pad_size)
    codes = torch.empty((padded, k // 2), dtype=torch.int8, device=x.device)
    scale = torch.empty((k // GROUP, padded), dtype=x.dtype, device=x.device)
    raw = None if lora_x is None else lora_x.contiguous()
    if not m:
        return codes, scale, torch.empty((0, down.shape[1]), dtype=torch.float32, device=x.device)
    low = _run(x.contiguous(), raw, smooth, down, codes, scale, padded, unsigned=unsigned, shift=0.0, packed=True)
    if low.shape[0] == 1:
        return codes, scale, low[0]
    out = torch.empty(low.shape[1:], dtype=torch.float32, device=x.device)
    add_splits(low, None, None, out)
    return codes, scale, out
