"""int4_plain_mm: 4-bit weights in plain rows times activations that are rounded to int8 by blocks of 32 columns.

    y[m, n] = sum over groups g of scale[n, g] * (inner[m, n, g] - zero[n, g] * moment[m, g])
    inner   = sum over blocks b of the group of step[m, b] * product[m, n, b]

One kernel rounds x: codes, the step of a block, and the moment of a group, sum of step * code. Another multiplies. The
weight is its left operand: nibbles become int8 in registers, all even columns of a block before all odd ones, and the
codes of x are stored in that order. The product of a block (of a group, where groups are narrower) is an exact integer,
on Turing, for which Triton has no integer products, one of float16; all else is float32. With few tokens K is split
over programs, whose float32 sums a third kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends import coalesced_linear
from lowbit.backends.triton import device, rounding
from lowbit.backends.triton.split_sums import add_splits, splits_for
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.dispatch import kernel
from lowbit.layouts.coalesced_int4 import ACTIVATION_BLOCK
from lowbit.numerics.groups import ceil_div, round_up

_BLOCK = tl.constexpr(ACTIVATION_BLOCK)
_STEP = 128  # columns in a turn of the loop
_FEW = 16  # tokens up to which the smallest tile is the only sensible one
_SMALLEST = tl.constexpr(2.0**-128)
_WIDEST = 16384  # columns of a group that a program rounds at a time
_SPAN = 256  # columns that it rounds where groups are narrow
_WIDE = 64  # tokens in the largest tile
_TOKENS = 1 << 12  # of a piece of x, whose codes are made and multiplied before the next one's
_TOLERANCE = 1e-3
# Four bytes in $2; the codes of even columns out in $0, of odd ones in $1.
NIBBLES = tl.constexpr("""{
.reg .b32 t;
and.b32 $0, $2, 0x0F0F0F0F;
shr.u32 t, $2, 4;
and.b32 $1, t, 0x0F0F0F0F;
}""")


@tuned([config(ROWS=1, warps=4, stages=1), config(ROWS=4, warps=4, stages=1)], key=("m_bucket", "k", "x", "GROUP"))
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _round_blocks(
    x, codes, step, moment, m, m_bucket, wide, k, GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """step [K/32, wide] and moment [K/GROUP, wide]: what lies beyond token m is left as it is."""
    BLOCKS: tl.constexpr = SPAN // _BLOCK
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SPAN
    column = first + tl.arange(0, BLOCKS)[None, :, None] * _BLOCK + tl.arange(0, _BLOCK)[None, None, :]
    start = token.to(tl.int64) * k
    inside = (token < m)[:, None, None] & (column < k)
    value = tl.load(x + start[:, None, None] + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(rounding.magnitude(value), axis=2).to(tl.float32, bitcast=True)
    found = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    # Below 2**-128 the reciprocal would be infinite: the block counts as zero. What is not finite becomes NaN.
    usable = (found > _SMALLEST) & (rounding.magnitude(found) < rounding.INFINITY)
    inverse = tl.where(usable, tl.div_rn(tl.full(found.shape, 1.0, tl.float32), tl.where(usable, found, 1.0)), 0.0)
    found = tl.where(rounding.magnitude(found) < rounding.INFINITY, found, float("nan"))
    scaled = tl.where(usable[:, :, None], value, 0.0) * inverse[:, :, None]
    code = tl.minimum(tl.maximum(rounding.half_even(scaled), -128), 127)
    ordered = tl.permute(tl.reshape(code, (ROWS, BLOCKS, _BLOCK // 2, 2)), (0, 1, 3, 2))
    at = tl.arange(0, SPAN)
    present = (token < m)[:, None] & (first + at < k)[None, :]
    tl.store(codes + start[:, None] + first + at[None, :], tl.reshape(ordered, (ROWS, SPAN)).to(tl.int8), mask=present)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    some = (token < m)[:, None] & (block < k // _BLOCK)[None, :]
    tl.store(step + block[None, :].to(tl.int64) * wide + token[:, None], found, mask=some)
    GROUPS: tl.constexpr = SPAN // GROUP
    if GROUP >= _BLOCK:
        by_block = tl.sum(code, axis=2).to(tl.float32) * found
        total = tl.sum(tl.reshape(by_block, (ROWS, GROUPS, GROUP // _BLOCK)), axis=2)
    else:
        pieces = tl.sum(tl.reshape(code, (ROWS, BLOCKS, _BLOCK // GROUP, GROUP)), axis=3).to(tl.float32)
        total = tl.reshape(pieces * found[:, :, None], (ROWS, GROUPS))
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    some = (token < m)[:, None] & (group < k // GROUP)[None, :]
    tl.store(moment + group[None, :].to(tl.int64) * wide + token[:, None], total, mask=some)


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller; on Turing the first.

    Each group of a turn has sums of its own. Of narrow ones those of 32 tokens and more have no place in tensor memory
    (the compiler makes the kernel a trap), or spill.
    """
    if arguments["HALVES"]:
        return configs[:1]
    narrow = arguments["GROUP"] < _STEP and device.tensor_memory(device.target_of(arguments["codes"].device))
    wanted = max(_FEW, min(arguments["m_bucket"], _FEW if narrow else _WIDE))
    return [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted] or list(configs[:1])


@triton.jit
def _int8_operand(packed, BLOCK_N: tl.constexpr, ASSEMBLE: tl.constexpr):
    """int8 [BLOCK_N, 16], two codes a byte -> int8 [BLOCK_N, 32] codes 0..15, the 16 of even columns first."""
    if ASSEMBLE:
        low, high = tl.inline_asm_elementwise(NIBBLES, "=r,=r,r", [packed], (tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low, high = packed & 15, (packed >> 4) & 15
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_N, _BLOCK))


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=8, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=64, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "k", "scale", "splits", "GROUP"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _int4_mm(
    codes, step, moment, qdata, scale, zero, bias, out, m, m_bucket, wide, n, k, splits: tl.constexpr,
    GROUP: tl.constexpr, ASSEMBLE: tl.constexpr, HALVES: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside, present = rows < n, tokens < m
    # What lies beyond the last row or token repeats the first, or is whatever `step` holds there: no mask in the loop.
    row, token = tl.where(inside, rows, 0).to(tl.int64), tl.where(present, tokens, 0)
    PIECES: tl.constexpr = _BLOCK // GROUP if GROUP < _BLOCK else 1  # groups in a block
    place = tl.arange(0, _BLOCK)
    piece_of = (2 * (place % 16) + place // 16) // GROUP  # the group in a block that a place belongs to
    # Blocks times bytes, not k // 2: so the compiler sees that every block begins at a multiple of 16 bytes.
    qdata_at = qdata + row[:, None] * (k // _BLOCK * (_BLOCK // 2)) + tl.arange(0, _BLOCK // 2)[None, :]
    codes_at = codes + token[None, :].to(tl.int64) * k + place[:, None]
    turns = k // COLUMNS
    first = (turns * split // splits).to(tl.int32)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for turn in range(first, (turns * (split + 1) // splits).to(tl.int32)):
        start = turn * COLUMNS
        group = start // GROUP
        for j in tl.static_range(COLUMNS // _BLOCK):
            packed = tl.load(qdata_at + start // 2 + j * (_BLOCK // 2))
            part = tl.load(codes_at + start + j * _BLOCK)
            weight = _int8_operand(packed, BLOCK_N, ASSEMBLE)
            steps = tl.load(step + (start // _BLOCK + j).to(tl.int64) * wide + tokens)
            for piece in tl.static_range(PIECES):
                if PIECES > 1:
                    chosen = tl.where((piece_of == piece)[None, :], weight, 0)
                else:
                    chosen = weight
                if HALVES:
                    product = tl.dot(chosen.to(tl.float16), part.to(tl.float16))
                else:
                    product = tl.dot(chosen, part, out_dtype=tl.int32).to(tl.float32)
                if PIECES > 1 or (j * _BLOCK) % GROUP == 0:
                    at = group + j * _BLOCK // GROUP + piece
                    factor = tl.load(scale + row * (k // GROUP) + at).to(tl.float32)
                    lowered = factor * tl.load(zero + row * (k // GROUP) + at).to(tl.float32)
                    begins = (tokens * 0 + start % GROUP) == 0  # of a group that takes several turns: once
                    whole = tl.load(moment + at.to(tl.int64) * wide + tokens, mask=begins, other=0.0)
                    sums = tl.fma(_spread(-lowered, sums), tl.broadcast_to(whole[None, :], sums.shape), sums)
                    inner = product * steps[None, :]
                else:
                    inner = tl.fma(product, tl.broadcast_to(steps[None, :], sums.shape), inner)
                if PIECES > 1 or ((j + 1) * _BLOCK) % GROUP == 0 or (j + 1) * _BLOCK == COLUMNS:
                    sums = tl.fma(inner, _spread(factor, sums), sums)
    if splits == 1:
        if bias is not None:
            sums += tl.load(bias + row).to(tl.float32)[:, None]
        out_at = out + tokens[None, :].to(tl.int64) * n + rows[:, None]
        tl.store(out_at, sums.to(out.dtype.element_ty), mask=present[None, :] & inside[:, None])
    else:
        out_at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
        tl.store(out_at, sums, mask=present[None, :] & inside[:, None])


@triton.jit
def _spread(by_row, like):
    return tl.broadcast_to(by_row[:, None], like.shape)


def refuses(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int) -> str | None:
    """Why this call cannot run here, or None."""
    for name, tensor in (("qdata", qdata), ("scale", scale), ("zero", zero), ("the bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} has gaps between its elements; the kernel reads contiguous tensors: call .contiguous() once"
    if group_size > _WIDEST:
        return f"groups of {group_size} columns; the kernel takes up to {_WIDEST}"
    return device.refuses_product(x, qdata=qdata, scale=scale, zero=zero, bias=bias)


@kernel("int4_plain_mm", backend="triton", refuses=refuses, tolerance=_TOLERANCE)
def int4_plain_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K], bytes [N, K/2], scale and zero [N, K/g], bias [N] or None -> [..., N] in the dtype of x."""
    k, n = x.shape[-1], qdata.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if out.numel():
        rows, result = x.reshape(-1, k), out.view(-1, n)
        for first in range(0, rows.shape[0], _TOKENS):
            some = slice(first, first + _TOKENS)
            _product(rows[some].contiguous(), qdata, scale, zero, bias, group_size, result[some])
    return out


def _product(
    rows: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group: int, out: Tensor
) -> None:
    (m, k), n, target = rows.shape, qdata.shape[0], device.target_of(rows.device)
    codes = torch.empty((m, k), dtype=torch.int8, device=rows.device)
    wide = round_up(m, _WIDE)
    step, moment = (codes.new_empty((k // width, wide), dtype=torch.float32) for width in (ACTIVATION_BLOCK, group))
    span = max(group, _SPAN)
    _round_blocks(
        lambda meta: (triton.cdiv(m, meta["ROWS"]), ceil_div(k, span)),
        rows.device, x=rows, codes=codes, step=step, moment=moment, m=m, m_bucket=bucket(m), wide=wide,
        k=k, GROUP=group, SPAN=span,
    )  # fmt: skip
    columns = _STEP if k % _STEP == 0 else ACTIVATION_BLOCK
    splits = splits_for(m, n, k // columns, target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=rows.device)
    _int4_mm(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        rows.device, codes=codes, step=step, moment=moment, qdata=qdata.view(torch.int8), scale=scale, zero=zero,
        bias=bias, out=sums, m=m, m_bucket=bucket(m), wide=wide, n=n, k=k, splits=splits, GROUP=group,
        ASSEMBLE=target.assembles, HALVES=target.kind == "cuda" and not target.assembles, COLUMNS=columns,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, None, bias, out)


coalesced_linear.serve("triton", int4_plain_mm, refuses, tolerance=_TOLERANCE)
