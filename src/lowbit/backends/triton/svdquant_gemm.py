"""The product of 4-bit activations and 4-bit weights in groups of 64 columns, with the low rank and the bias behind it.

    out[m, n] = sum over groups g of sx[g, m] * sw[g, n] * (sum over k in g of x[m, k] * w[n, k])
                + sum over r of low[m, r] * up[n, r] + bias[n]

The inner sums are exact int32 of int8 tensor cores. The weight is the left operand and stays in registers: a nibble in
the upper half of a byte is 16 times its code as int8, so that two instructions decode four bytes, and the products are
16 times too large until the end. Activations come one byte a code, in each group the even columns first and then the
odd ones, as `quantize_svdquant_w4a4` writes them: so the low nibbles of 32 bytes meet 32 bytes of activations, and the
high nibbles the next 32. Weights need no repacking.

Scaling the sums is most of the work with many tokens, so it is kept to two instructions a sum and group. `OFFSET` does
away with the conversion to float: a sum plus 2**17 (more than 16 * 64 * 15 * 8) is not negative, and the bits of a
small positive integer are those of the float 2**-149 times as large. That times (2**96 * sw) minus (2**-36 * sw), which
both are exact, is 2**-53 * sum * sw, rounded once, in one instruction; 2**49 at the end puts it right. The 2**17 is the
accumulator's first value or, where an accumulator would have to be written every time (wgmma), one more product of
constants: 32 * 64 * 64. On Turing the products are those of float16, as exact, summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.device import Target
from lowbit.backends.triton.split_sums import add_splits
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.dispatch import kernel
from lowbit.layouts import svdquant_tiles as tiles
from lowbit.numerics.groups import round_up
from lowbit.numerics.int4_matmul import GROUP

TOLERANCE = 3e-3  # codes and integer sums are eager's; what differs is the order of float32 sums before the last cast
# Values of OFFSET: none, by a product of constants, as the accumulator's start; or no integers, but float16 products.
CONVERT, MULTIPLY, START, HALVES = 0, 1, 2, 3
_START = tl.constexpr(1 << 17)
_UP, _DOWN = tl.constexpr(2.0**96), tl.constexpr(-(2.0**-36))
_FINISH, _SIXTEENTH = tl.constexpr(2.0**49), tl.constexpr(1 / 16)
_RANKS = tl.constexpr(32)  # columns of the low rank in one product
_FEWEST, _MOST = 16, 128  # tokens of a tile
_LOWS = {CONVERT: 2, MULTIPLY: 4, START: 2, HALVES: 2}  # sums of the low rank that a program adds at once
_SOME = 512  # tokens up to which the low rank's sums come in more pieces
_MOST_SPLITS = 16
NIBBLES = tl.constexpr("shl.b32 $0, $2, 4;\nand.b32 $0, $0, 0xF0F0F0F0;\nand.b32 $1, $2, 0xF0F0F0F0;")


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller.

    The largest has too few registers where the products take two of them for every sum (mma); Turing has none to spare.
    """
    if arguments["OFFSET"] == HALVES:
        return configs[:1]
    wanted = max(_FEWEST, min(arguments["m_bucket"], _MOST))
    most = 4 if arguments["OFFSET"] == START else 8
    fit = [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted and one.warps <= most]
    return fit or list(configs[:1])


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=5),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=32, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, warps=4, stages=3),
        config(BLOCK_M=128, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=4),
    ],
    key=("m_bucket", "n", "k", "rank", "out", "scale", "splits", "TILED"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket", "low_rows"))
def _grouped_product(
    x, x_scale, low, codes, scale, up, bias, out, m, m_bucket, m_padded, low_rows, n, k, rank, splits: tl.constexpr,
    LOWS: tl.constexpr, CHUNK: tl.constexpr, TILED: tl.constexpr, OFFSET: tl.constexpr, ASSEMBLE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    groups = k // 64
    converts: tl.constexpr = OFFSET % 3 == 0
    loaded = tl.minimum(rows, n - 1)  # rows beyond the last repeat it: no mask in the loop
    byte = tl.arange(0, 32)
    if TILED:
        tile, row = (loaded // 128).to(tl.int64) * groups, loaded % 128
        code_at = codes + (tile * 4096 + row * 32)[:, None] + byte[None, :]
        scale_at = scale + tile * 128 + row
        code_step, scale_step = 4096, 128
    else:
        # Of groups times bytes the compiler sees that every row begins at a multiple of 32 bytes, of k // 2 only of 8.
        # With copies of 16, though, assemblers for GPUs without wgmma spill a few registers.
        row_bytes = groups * 32 if OFFSET == 1 else k // 2
        code_at = codes + loaded[:, None].to(tl.int64) * row_bytes + byte[None, :]
        scale_at = scale + loaded
        code_step, scale_step = 32, n
    x_at = x + tokens[None, :].to(tl.int64) * k + byte[:, None]
    x_scale_at = x_scale + tokens
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(groups * split // splits, groups * (split + 1) // splits):
        w_scale = tl.load(scale_at + tl.cast(group, tl.int64) * scale_step).to(tl.float32)
        t_scale = tl.load(x_scale_at + tl.cast(group, tl.int64) * m_padded)
        packed = tl.load(code_at + tl.cast(group, tl.int64) * code_step)
        even, odd = nibbles(packed, ASSEMBLE)
        if OFFSET == 1:
            sums = tl.dot(tl.full((BLOCK_N, 32), 64, tl.int8), tl.full((32, BLOCK_M), 64, tl.int8), out_dtype=tl.int32)
        elif OFFSET == 2:
            sums = tl.full((BLOCK_N, BLOCK_M), _START, tl.int32)
        else:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if OFFSET == 3 else tl.int32)
        x_even, x_odd = tl.load(x_at + group * 64), tl.load(x_at + (group * 64 + 32))
        if OFFSET == 3:
            sums = tl.dot(even.to(tl.float16), x_even.to(tl.float16), sums)
            sums = tl.dot(odd.to(tl.float16), x_odd.to(tl.float16), sums)
        else:
            sums = tl.dot(even, x_even, sums, out_dtype=tl.int32)
            sums = tl.dot(odd, x_odd, sums, out_dtype=tl.int32)
        if converts:
            scaled = sums.to(tl.float32) * w_scale[:, None]
        else:
            scaled = tl.fma(
                sums.to(tl.float32, bitcast=True),
                tl.broadcast_to((w_scale * _UP)[:, None], (BLOCK_N, BLOCK_M)),
                tl.broadcast_to((w_scale * _DOWN)[:, None], (BLOCK_N, BLOCK_M)),
            )
        acc = tl.fma(scaled, tl.broadcast_to(t_scale[None, :], (BLOCK_N, BLOCK_M)), acc)
    if converts:
        acc *= _SIXTEENTH
    else:
        acc *= _FINISH
    present = (tokens < m)[None, :] & (rows < n)[:, None]
    held = tl.minimum(tokens, low_rows - 1)
    # The sums of the low rank are shared among the programs that share K: all are linear in them.
    if splits <= LOWS:
        first = split * (LOWS // splits)
        acc = _add_low_rank(acc, low, up, first, held, loaded, low_rows, rank, LOWS // splits, CHUNK, TILED, EXACT)
    elif split < LOWS:
        acc = _add_low_rank(acc, low, up, split, held, loaded, low_rows, rank, 1, 1, TILED, EXACT)
    if splits == 1:
        if bias is not None:
            acc += tl.load(bias + loaded).to(tl.float32)[:, None]
        at = out + tokens[None, :].to(tl.int64) * n + rows[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), mask=present)
    else:
        at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
        tl.store(at, acc, mask=present)


@triton.jit
def nibbles(packed, ASSEMBLE: tl.constexpr):
    """int8 bytes -> int8, 16 times the signed code in the low nibbles, and in the high ones."""
    if ASSEMBLE:
        low, high = tl.inline_asm_elementwise(NIBBLES, "=&r,=r,r", [packed], (tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low, high = (packed << 4).to(tl.int8), (packed & -16).to(tl.int8)
    return low, high


@triton.jit
def _add_low_rank(
    acc, low, up, low_from, tokens, rows, low_rows, rank, COUNT: tl.constexpr, MOST: tl.constexpr,
    TILED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """acc [rows, tokens] plus up [rows, rank] times the sum of COUNT pieces of low [S, tokens, rank]."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    CHUNK: tl.constexpr = COUNT if COUNT < MOST else MOST  # noqa: FURB136
    for first in tl.range(0, rank, _RANKS, num_stages=1):
        column = first + tl.arange(0, _RANKS)
        inside = column < rank
        right = tl.zeros((_RANKS, BLOCK_M), tl.float32)
        for start in tl.range(0, COUNT, CHUNK, num_stages=1):  # no more at once than there are registers for
            for part in tl.static_range(CHUNK):
                piece = (low_from + start + part) * low_rows.to(tl.int64) + tokens[None, :]
                right += tl.load(low + piece * rank + column[:, None], mask=inside[:, None], other=0.0)
        if TILED:
            up_at = up + ((rows // 128).to(tl.int64) * rank * 128 + rows % 128)[:, None] + column[None, :] * 128
        else:
            up_at = up + rows[:, None].to(tl.int64) * rank + column[None, :]
        left = tl.load(up_at, mask=tl.broadcast_to(inside[None, :], (BLOCK_N, _RANKS)), other=0.0).to(tl.float32)
        if EXACT:
            acc = tl.dot(left, right, acc, input_precision="ieee")
        else:  # bfloat16 and float16 are exact in TF32; a float32 is two of its numbers, to 22 bits
            high = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            acc = tl.dot(left, high, acc, input_precision="tf32")
            acc = tl.dot(left, right - high, acc, input_precision="tf32")
    return acc


def padded_tokens(m: int) -> int:
    """How many rows of activations the kernel may read for m tokens: whole tiles."""
    return round_up(m, max(_FEWEST, min(bucket(m), _MOST)))


def splits_of(m: int, n: int, blocks: int, target: Target) -> int:
    """Into how many pieces to cut `blocks` blocks of columns so that the processors have work: a power of two.

    Fewer with many tokens, whose partial sums are many, too.
    """
    each = 8 if m <= _FEWEST else 4 if m <= _MOST // 2 else 2  # programs of 64 rows for a processor
    tiles = triton.cdiv(n, 64) * triton.cdiv(m, _MOST)
    wanted = min(each * target.processors // tiles, blocks, _MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def low_splits(m: int, n: int, k: int, target: Target) -> int:
    """The most pieces of the low rank's sums that the kernel should add up."""
    each = 16 if m <= _FEWEST else 8 if m <= _SOME else 4
    return each * splits_of(m, n, k // GROUP, target)


def offset_of(target: Target) -> int:
    """How the sums are made floats: see the module."""
    if target.kind == "interpreter" or (target.kind == "cuda" and target.capability[0] in (9, 10)):
        return MULTIPLY
    if target.assembles:
        return START
    return HALVES if target.kind == "cuda" else CONVERT  # Triton has no integer products for Turing


def grouped_product(
    codes: Tensor, scale: Tensor, low: Tensor, weight: Tensor, weight_scale: Tensor, up: Tensor, bias: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the sum above into out [..., N] of M tokens.

    codes: int8 [padded_tokens(M), K], the even columns of each group first, with scales float32 [K/64,
    padded_tokens(M)]; of both only M tokens count. low: float32 [S, L, R] with L >= M, to be summed over S, a power of
    two. weight: bytes [N, K/2] with weight_scale [K/64, N] and up [N, R], or tiles.
    """
    n, rank, target = out.shape[-1], low.shape[-1], device.target_of(out.device)
    m, k = out.numel() // n, codes.shape[1]
    splits = splits_of(m, n, k // GROUP, target)
    bias = None if bias is None else bias.contiguous()
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
    _grouped_product(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        out.device, x=codes, x_scale=scale, low=low, codes=weight, scale=weight_scale, up=up, bias=bias, out=sums, m=m,
        m_bucket=bucket(m), m_padded=codes.shape[0], low_rows=low.shape[1], n=n, k=k, rank=rank, splits=splits,
        LOWS=low.shape[0], CHUNK=_LOWS[offset_of(target)], TILED=weight.dim() == 4, OFFSET=offset_of(target),
        ASSEMBLE=target.assembles, EXACT=up.dtype == torch.float32 or not target.assembles,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, None, bias, out)


# ---- the named op ---------------------------------------------------------------------------------------------------


@tuned([config(BLOCK_M=64, warps=4, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _spread_codes(act, scale, codes, x_scale, m, m_padded, k, UNSIGNED: tl.constexpr, BLOCK_M: tl.constexpr):
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1).to(tl.int64)
    present = tokens < m
    byte = tl.arange(0, 32)
    at = tokens[:, None].to(tl.int64) * k + group * 64 + byte[None, :]
    packed_at = act + tokens[:, None].to(tl.int64) * (k // 64 * 32) + group * 32 + byte[None, :]
    packed = tl.load(packed_at, mask=present[:, None])
    low, high = packed.to(tl.int32) & 15, (packed.to(tl.int32) >> 4) & 15
    if not UNSIGNED:
        low, high = (low ^ 8) - 8, (high ^ 8) - 8
    tl.store(codes + at, low.to(tl.int8), mask=present[:, None])
    tl.store(codes + at + 32, high.to(tl.int8), mask=present[:, None])
    tl.store(x_scale + group * m_padded + tokens, tl.load(scale + group * m + tokens, mask=present), mask=present)


def refuses_mm(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None,
    unsigned: bool,
) -> str | None:  # fmt: skip
    """Why this call cannot run here, or None."""
    return device.refuses(act, wgt=wgt, ascales=ascales, wscales=wscales, lora_act_in=low, lora_up=up, bias=bias)


@kernel("scaled_mm_svdquant_w4a4", backend="triton", refuses=refuses_mm, tolerance=TOLERANCE)
def scaled_mm_svdquant_w4a4(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None,
    unsigned: bool,
) -> Tensor:  # fmt: skip
    """bytes [M, K/2] and their scales, a plain or tiled weight and its scales, low-rank factors -> [M, N] as `up`."""
    m, k = act.shape[0], 2 * act.shape[1]
    out = up.new_empty((m, wgt.shape[0] * (tiles.ROWS if wgt.dim() == 4 else 1)))
    if not out.numel():
        return out
    padded = padded_tokens(m)
    codes = torch.empty((padded, k), dtype=torch.int8, device=act.device)
    scale = torch.empty((k // GROUP, padded), dtype=torch.float32, device=act.device)
    _spread_codes(
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), k // GROUP),
        act.device, act=act.contiguous(), scale=ascales.contiguous(), codes=codes, x_scale=scale, m=m, m_padded=padded,
        k=k, UNSIGNED=unsigned,
    )  # fmt: skip
    grouped_product(
        codes, scale, low.float().contiguous().unsqueeze(0), wgt.contiguous(), wscales.contiguous(), up.contiguous(),
        bias, out,
    )  # fmt: skip
    return out
