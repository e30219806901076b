"""Products of two matrices of codes with scales of groups in the layout `scale_128x4`: nvfp4 and mxfp8.

    out[m, n] = alpha * sum over k of value(a[m, k]) * scale_a[m, k] * value(b[n, k]) * scale_b[n, k]  + bias[n]

Both operands are decoded where they are multiplied, in one fused loop; b is the left operand, decoded in registers. A
code times its scale is exact in bfloat16 for nvfp4, whose products have six bits, and for mxfp8 but for values below
2**-126, of which bfloat16 keeps what is a multiple of 2**-133. Turing and the interpreter have no bfloat16 and multiply
float32. Sums are float32; alpha and the bias are applied to them and the result is cast once.

A thread reads words of codes. The decoder gives the first code of all words, then the second: of both operands alike,
so that columns meet in another order than they are stored in, which does not matter to a sum. With few rows of a K is
split over programs, whose float32 sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import bytes_values, device, encoders, group_tiles, words
from lowbit.backends.triton.floats import e4m3_value, e8m0_value
from lowbit.backends.triton.split_sums import add_splits, splits_for
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned

_COLUMNS = 128  # of a block
_NARROW_COLUMNS = 64  # of mxfp8, where registers hold both operands
_ONE_IN_REGISTERS = (9, 10, 11)  # major compute capabilities whose tensor cores read at least one from shared memory
_OLD_COLUMNS = 32  # on Turing, for whose tensor cores Triton has no code: what its registers hold
_LOWERED = tl.constexpr(16384.0)  # 2**14: tiny codes of both operands, times 2**126, by scales raised by 2**119


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of rows of a is not far larger than their number, nor far smaller."""
    if arguments["BLOCK_K"] == _OLD_COLUMNS:
        return configs[:1]
    wanted = max(16, min(arguments["m_bucket"], 128))
    return [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted]


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=64, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "width", "splits", "FP4"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _scaled_mm_blocks(
    a, b, a_scale, b_scale, alpha, bias, out, m, m_bucket, n, width, groups, splits: tl.constexpr, FP4: tl.constexpr,
    DTYPE: tl.constexpr, TINY: tl.constexpr, PROGRAM: tl.constexpr, RAGGED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """width, groups: words of codes and scales in a row."""
    WORDS: tl.constexpr = BLOCK_K // 8 if FP4 else BLOCK_K // 4
    GROUPS: tl.constexpr = BLOCK_K // 16 if FP4 else BLOCK_K // 32
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    # Rows beyond the last repeat row 0: no mask in the loop.
    row, token = tl.where(rows < n, rows, 0), tl.where(tokens < m, tokens, 0)
    word = tl.arange(0, WORDS)[None, :]
    b_at = b + row[:, None].to(tl.int64) * width + word
    a_at = a + token[:, None].to(tl.int64) * width + word
    blocks = tl.cdiv(width, WORDS)
    first = blocks * split // splits
    last = blocks * (split + 1) // splits
    tl.assume(first < last)  # else the compiler, for what skips the loop, lets each product of Hopper's end at once
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Scales are read one block ahead: they are too small for copies that go on by themselves.
    b_next = _scales(b_scale, row, first, groups, GROUPS, RAGGED)
    a_next = _scales(a_scale, token, first, groups, GROUPS, RAGGED)
    for block in range(first, last):
        b_factor, a_factor = _by_word(b_next, FP4, DTYPE, TINY, WORDS), _by_word(a_next, FP4, DTYPE, TINY, WORDS)
        ahead = tl.minimum(block + 1, last - 1)
        b_next = _scales(b_scale, row, ahead, groups, GROUPS, RAGGED)
        a_next = _scales(a_scale, token, ahead, groups, GROUPS, RAGGED)
        if RAGGED:
            there = block * WORDS + word < width
            b_word = tl.load(b_at + block * WORDS, mask=there, other=0)
            a_word = tl.load(a_at + block * WORDS, mask=there, other=0)
        else:
            b_word, a_word = tl.load(b_at + block * WORDS), tl.load(a_at + block * WORDS)
        left = _values(b_word, b_factor, FP4, DTYPE, TINY, PROGRAM)
        right = _values(a_word, a_factor, FP4, DTYPE, TINY, PROGRAM)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    if TINY:
        sums *= _LOWERED
    inside = (tokens < m)[None, :] & (rows < n)[:, None]
    if splits == 1:
        if alpha is not None:
            sums *= tl.load(alpha)
        if bias is not None:
            sums += tl.load(bias + row).to(tl.float32)[:, None]
    at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scales(scale, row, block, groups, GROUPS: tl.constexpr, RAGGED: tl.constexpr):
    """The scales of a block of columns: uint8 [rows, GROUPS]. What the padding of the layout holds counts as 0."""
    group = (block * GROUPS + tl.arange(0, GROUPS))[None, :]
    at = scale + group_tiles.swizzled(row[:, None].to(tl.int64), group, groups)
    if RAGGED:
        return tl.load(at, mask=group < groups, other=0)
    return tl.load(at)


@triton.jit
def _by_word(stored, FP4: tl.constexpr, DTYPE: tl.constexpr, TINY: tl.constexpr, WORDS: tl.constexpr):
    """uint8 [rows, groups] -> what the values of each word are multiplied by: [rows, WORDS] in DTYPE, exactly."""
    rows: tl.constexpr = stored.shape[0]
    groups: tl.constexpr = stored.shape[1]
    if FP4:
        factor = e4m3_value(stored.to(tl.int32))
        if TINY:
            factor *= 2.0**119  # not 2**126: with that, the largest would pass what bfloat16 holds
    else:
        factor = e8m0_value(stored.to(tl.int32))
    wide = tl.broadcast_to(factor.to(DTYPE)[:, :, None], (rows, groups, WORDS // groups))
    return tl.reshape(wide, (rows, WORDS))


@triton.jit
def _values(word, factor, FP4: tl.constexpr, DTYPE: tl.constexpr, TINY: tl.constexpr, PROGRAM: tl.constexpr):
    """int32 words [rows, W] and a factor of each -> [rows, 8 W] (4 W) in DTYPE, the first code of all words first."""
    rows: tl.constexpr = word.shape[0]
    count: tl.constexpr = word.shape[1]
    if FP4:
        four = words.decode(word, words.TINY_E2M1 if TINY else words.E2M1, DTYPE, TINY)
        low = tl.join(tl.join(four[0] * factor, four[1] * factor), tl.join(four[2] * factor, four[3] * factor))
        high = tl.join(tl.join(four[4] * factor, four[5] * factor), tl.join(four[6] * factor, four[7] * factor))
        return tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), (rows, 8 * count))
    else:
        four = bytes_values.decode(word, None, bytes_values.E4M3, DTYPE, PROGRAM)
        both = tl.join(tl.join(four[0] * factor, four[1] * factor), tl.join(four[2] * factor, four[3] * factor))
        return tl.reshape(tl.permute(both, (0, 3, 2, 1)), (rows, 4 * count))


def refuses(a: Tensor, out_dtype: torch.dtype, bias: Tensor | None, **others: Tensor | None) -> str | None:
    """Why a product cannot run here, or None. others: the other operand and scales."""
    given = {name: one for name, one in {**others, "bias": bias}.items() if one is not None}
    return encoders.refuses_result(out_dtype) or encoders.refuses_values(a=a, **given)


def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, alpha: Tensor | None, bias: Tensor | None,
    out_dtype: torch.dtype, *, fp4: bool,
) -> Tensor:  # fmt: skip
    """a [M, bytes], b [N, bytes] and their swizzled scales, alpha float32 [], bias [N] -> [M, N] in `out_dtype`.

    fp4: e2m1 codes, two a byte, with scales e4m3 of 16; else e4m3 codes with scales e8m0 of 32.
    """
    m, n = a.shape[0], b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if not m or not n:
        return out
    if not a.shape[1]:  # nothing to multiply: the kernel counts on a block of columns
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    target = device.target_of(a.device)
    old = target.kind == "cuda" and not target.assembles
    dtype = torch.float32 if old or target.kind == "interpreter" else torch.bfloat16
    wide = fp4 or (target.kind == "cuda" and target.capability[0] in _ONE_IN_REGISTERS)
    columns = _OLD_COLUMNS if old else _COLUMNS if wide else _NARROW_COLUMNS
    k = a.shape[1] * (2 if fp4 else 1)
    splits = splits_for(m, n, triton.cdiv(k, columns), target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=a.device)
    _scaled_mm_blocks(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        a.device, a=_words(a), b=_words(b), a_scale=scale_a.contiguous().view(torch.uint8),
        b_scale=scale_b.contiguous().view(torch.uint8), alpha=alpha, bias=None if bias is None else bias.contiguous(),
        out=sums, m=m, m_bucket=bucket(m), n=n, width=a.shape[1] // 4, groups=k // (16 if fp4 else 32), splits=splits,
        FP4=fp4, DTYPE=tl.float32 if dtype == torch.float32 else tl.bfloat16, TINY=fp4 and target.assembles,
        PROGRAM="" if fp4 else bytes_values.program(bytes_values.E4M3, dtype, target, scaled=False),
        RAGGED=k % columns != 0, BLOCK_K=columns,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, alpha, bias, out)
    return out


def _words(codes: Tensor) -> Tensor:
    """Codes in rows without gaps, four bytes an element."""
    codes = codes.contiguous()
    if codes.data_ptr() % 4:
        codes = codes.clone()
    return codes.view(torch.uint8).view(torch.int32)
