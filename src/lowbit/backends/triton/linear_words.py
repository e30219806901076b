"""linear for 4-bit codes in the layout words128: awq_w4a16, wna16, nvfp4 and mxfp4, with activations as they are.

    out[m, n] = alpha[n] * sum over k of x[m, k] * ((value(code) - offset) * scale + zero)  + bias[n]

The weight is the left operand, decoded in registers; activations are the right one and go through shared memory. A
decoded weight is rounded once to the dtype of x (that of nvfp4 and mxfp4 is exact but for `alpha`, which multiplies the
float32 sums). With few tokens K is split: up to four are folded into the tile (`_fold`), else over programs, whose
float32 sums a second kernel adds in a fixed order.

Up to 8 tokens are one tile of NVIDIA's small products, for one token, too: the compiled loop for Hopper has 3.0 to 4.2
instructions a code, loads and scales included. To decode a code, widen it and multiply it by hand is 3.4 without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, scale_codes, words
from lowbit.backends.triton.device import Target
from lowbit.backends.triton.floats import e4m3_value, e8m0_value
from lowbit.backends.triton.split_sums import add_splits, splits_for, store_sums
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts.words128 import COLUMNS, NAME

PLAIN, E4M3, E8M0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what scales are stored as
_STEP = 16  # columns of one product
_SMALLEST = 8  # tokens of the smallest tile
_FOLDED_ROWS = 128  # of a tile or two, for each processor
_FEW = 16  # tokens up to which the smallest tile is the only sensible one
_WGMMA = 9  # the major compute capability whose products go on by themselves
# With tensor memory Triton 3.6 makes the tiles of more than 32 tokens a trap, which tuning passes over: one that works
# is always among those to try, and is the first.
_SAFE = 32
# Tokens from which the weight is decoded once for all of them: from here on a tile of 128 tokens decodes each code four
# times and more, and the decoded weight is read once a tile, too. Reasoned from that; not measured on a GPU yet.
MANY = 512


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller.

    On Hopper one product of a whole block: of several in a turn, Triton waits for each before it decodes the weights of
    the next one. Elsewhere such a tile of more than 16 tokens has no registers left.
    """
    target = device.target_of(arguments["x"].device)
    hopper = target.kind == "cuda" and target.capability[0] == _WGMMA
    smallest = 8 if arguments["ASSEMBLE"] else 16  # what NVIDIA's tensor cores take, and others'
    wanted = max(smallest, min(arguments["m_bucket"], 128))
    least = wanted // 2 if wanted > _FEW else wanted
    if device.tensor_memory(target):
        least = min(least, _SAFE)
    tallest = 256 if target.kind == "cuda" and target.capability >= (9, 0) else 128  # others run out of registers
    fitting = [
        one
        for one in configs
        if one.constants["BLOCK_N"] <= tallest
        and (one.constants["JOINED"] if hopper else one.constants["BLOCK_M"] <= _FEW or not one.constants["JOINED"])
    ]
    return [one for one in fitting if least <= one.constants["BLOCK_M"] <= wanted] or fitting[:1]


@tuned(
    [
        # JOINED is one product of 128 columns a block instead of eight of 16: fewer barriers, more registers.
        config(BLOCK_M=16, BLOCK_N=64, JOINED=1, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=64, JOINED=1, warps=2, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, JOINED=1, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, JOINED=0, warps=4, stages=4),
        config(BLOCK_M=8, BLOCK_N=32, JOINED=1, warps=1, stages=4),
        config(BLOCK_M=8, BLOCK_N=64, JOINED=1, warps=2, stages=4),
        config(BLOCK_M=8, BLOCK_N=128, JOINED=1, warps=4, stages=4),
        config(BLOCK_M=8, BLOCK_N=128, JOINED=1, warps=2, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, JOINED=1, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=128, JOINED=1, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=256, JOINED=1, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, JOINED=1, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=256, JOINED=1, warps=8, stages=3),
        config(BLOCK_M=32, BLOCK_N=128, JOINED=0, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, JOINED=0, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=256, JOINED=0, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, JOINED=0, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "k", "x", "scale", "zero", "offset", "splits", "fold", "CODE", "GROUP"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _linear_words(
    x, codes, scale, zero, offset, alpha, bias, out, m, m_bucket, n, k, splits: tl.constexpr, fold: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROW_ALPHA: tl.constexpr, ASSEMBLE: tl.constexpr,
    HALF_SCALES: tl.constexpr, JOINED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A row of the tile is one of `fold` pieces of a row of the weight, and so is a row of x: see `_fold`.
    HEIGHT: tl.constexpr = BLOCK_N // fold
    place = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * HEIGHT + place % HEIGHT
    piece = place // HEIGHT
    width = k // (fold * 128) * 128
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    join: tl.constexpr = JOINED and dtype != tl.float32  # a tile of float32 would not fit into shared memory
    loaded = tl.where(rows < n, rows, 0)  # rows beyond the last repeat row 0: no mask in the loop
    present = (tokens < m * fold)[None, :]
    word = tl.arange(0, 16)
    # Blocks times words, not k // 8: so the compiler sees that every block begins at a multiple of 64 bytes.
    row_words, piece_words = k // 128 * 16, width // 128 * 16
    code_at = codes + (loaded.to(tl.int64) * row_words + piece * piece_words)[:, None] + word[None, :]
    column = tl.arange(0, 128 if join else 16)
    x_at = x + tokens[None, :].to(tl.int64) * width + column[:, None]
    scales_at = loaded + piece.to(tl.int64) * (width // GROUP) * n if fold > 1 else loaded
    blocks = width // 128
    first = blocks * split // splits
    last = blocks * (split + 1) // splits
    tl.assume(first < last)  # else the compiler, for what skips the loop, lets each product of Hopper's end at once
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Scales are read one block ahead: they are too small for copies that go on by themselves.
    next_scale = _of_block(scale, first, n, scales_at, GROUP)
    if zero is not None:
        next_zero = _of_block(zero, first, n, scales_at, GROUP)
    if offset is not None:
        next_offset = _of_block(offset, first, n, scales_at, GROUP)
    for block in range(first, last):
        factors = _columns(_factor(next_scale, SCALE, HALF_SCALES, dtype))
        added = _columns(_factor(next_zero, PLAIN, HALF_SCALES, dtype)) if zero is not None else factors
        lowered = _columns((next_offset.to(tl.float32) - 8.0).to(dtype)) if offset is not None else factors
        ahead = tl.minimum(block + 1, last - 1)
        next_scale = _of_block(scale, ahead, n, scales_at, GROUP)
        if zero is not None:
            next_zero = _of_block(zero, ahead, n, scales_at, GROUP)
        if offset is not None:
            next_offset = _of_block(offset, ahead, n, scales_at, GROUP)
        values = words.decode(tl.load(code_at + block * 16), CODE, dtype, ASSEMBLE)
        weights = ()
        for j in tl.static_range(8):
            weight = _weight(
                values[j],
                factors[16 * j // GROUP],
                None if zero is None else added[16 * j // GROUP],
                None if offset is None else lowered[16 * j // GROUP],
                HALF_SCALES,
                dtype,
            )
            if join:
                weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
            else:
                part = tl.load(x_at + block * 128 + 16 * j, mask=present, other=0.0)
                sums = tl.dot(weight, part, sums, input_precision="ieee")
        if join:
            part = tl.load(x_at + block * 128, mask=present, other=0.0)
            sums = tl.dot(_side_by_side(weights, BLOCK_N), part, sums)
    if CODE == words.TINY_E2M1:
        sums *= 128.0  # 2**(126 - 119), and for float16 2**(14 - 7)
    if fold > 1:  # a piece of a row was multiplied with all pieces of x: what counts is the one of the same columns
        sums = tl.where(piece[:, None] == (tokens % fold)[None, :], sums, 0.0)
        sums = tl.sum(tl.sum(tl.reshape(sums, (fold, HEIGHT, BLOCK_M // fold, fold)), axis=3), axis=0)
        rows = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        tokens = tl.program_id(1) * (BLOCK_M // fold) + tl.arange(0, BLOCK_M // fold)
    store_sums(sums, alpha, bias, out, rows, tokens, split, m, n, splits, ROW_ALPHA)


@triton.jit
def _weight(value, factor, added, lowered, HALF_SCALES: tl.constexpr, DTYPE: tl.constexpr):
    """(value - lowered) * factor + added by rows, rounded once: [N, 16] and vectors [N] -> [N, 16]."""
    if lowered is not None:
        value -= lowered[:, None]  # exact: both are small integers
    factor = tl.broadcast_to(factor[:, None], value.shape)
    if not HALF_SCALES:
        weight = value.to(tl.float32) * factor
        if added is not None:
            weight += added[:, None]
    elif added is None:
        weight = value * factor
    else:
        weight = tl.fma(value, factor, tl.broadcast_to(added[:, None], value.shape))
    return weight.to(DTYPE)


@triton.jit
def _side_by_side(parts, ROWS: tl.constexpr):
    """Eight tensors [N, 16] -> [N, 128], without moving a value to another thread."""
    even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
    odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), (ROWS, 128))


@triton.jit
def _of_block(values, block, n, rows, GROUP: tl.constexpr):
    """What is stored by group [G, N] for a block of 128 columns: [number of groups, rows]."""
    if GROUP >= 128:
        return tl.load(values + (block * 128 // GROUP).to(tl.int64) * n + rows)[None, :]
    else:  # not after it: Triton compiles what stands behind a return, too
        group = block * (128 // GROUP) + tl.arange(0, 128 // GROUP)
        return tl.load(values + group[:, None].to(tl.int64) * n + rows[None, :])


@triton.jit
def _columns(tile):
    """[groups, N] -> as many vectors [N] as a block has sixteens, in the order of their columns."""
    count: tl.constexpr = tile.shape[0]
    rows: tl.constexpr = tile.shape[1]
    if count == 1:
        return (tl.reshape(tile, (rows,)),)
    elif count == 2:
        return tl.split(tl.trans(tile))
    elif count == 4:
        even, odd = tl.split(tl.reshape(tl.trans(tile), (rows, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a, b, c, d)
    else:
        even, odd = tl.split(tl.reshape(tl.trans(tile), (rows, 2, 2, 2)))
        even_low, even_high = tl.split(even)
        odd_low, odd_high = tl.split(odd)
        a, e = tl.split(even_low)
        c, g = tl.split(even_high)
        b, f = tl.split(odd_low)
        d, h = tl.split(odd_high)
        return (a, b, c, d, e, f, g, h)


@triton.jit
def _factor(stored, SCALE: tl.constexpr, HALF_SCALES: tl.constexpr, DTYPE: tl.constexpr):
    """What is stored, as what a value is multiplied by: in DTYPE where nothing is lost, or else in float32."""
    if HALF_SCALES and SCALE == E4M3:
        return scale_codes.e4m3_raised(stored, DTYPE)  # for TINY_E2M1
    elif HALF_SCALES and SCALE == E8M0:
        return scale_codes.e8m0_bf16(stored)
    elif HALF_SCALES:
        return stored.to(DTYPE)
    elif SCALE == E4M3:
        return e4m3_value(stored.to(tl.int32))
    elif SCALE == E8M0:
        return e8m0_value(stored.to(tl.int32))
    else:
        return stored.to(tl.float32)


def product(
    x: Tensor, codes: Tensor, scale: Tensor, *, group: int, code: tl.constexpr, stored: tl.constexpr,
    zero: Tensor | None = None, offset: Tensor | None = None, alpha: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K], codes int32 [N, K/8], scale, zero, offset [G, N], alpha [] or [N] -> [..., N] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = rows.shape, codes.shape[0]
    target = device.target_of(x.device)
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    bias = None if bias is None else bias.contiguous()
    alpha = None if alpha is None else alpha.contiguous()
    assembles = target.assembles and x.dtype != torch.float32
    half = assembles and _exact_in(x.dtype, scale, stored) and (zero is None or zero.dtype == x.dtype)
    if half and stored.value == E4M3.value:
        code = words.TINY_E2M1  # normal again by scales that are raised as far as the dtype goes
    fold = _fold(m, n, k, group, target)
    splits = splits_for(m, n, k // COLUMNS, target) if fold == 1 else 1
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    _linear_words(
        lambda meta: (triton.cdiv(n * fold, meta["BLOCK_N"]), triton.cdiv(m * fold, meta["BLOCK_M"]), splits),
        x.device, x=rows, codes=codes, scale=_bytes(scale), zero=zero, offset=offset, alpha=alpha, bias=bias, out=sums,
        m=m, m_bucket=bucket(m), n=n, k=k, splits=splits, fold=fold, CODE=code, SCALE=stored, GROUP=group,
        ROW_ALPHA=alpha is not None and alpha.numel() > 1, ASSEMBLE=assembles,
        HALF_SCALES=half,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, alpha, bias, out)
    return out


def _fold(m: int, n: int, k: int, group: int, target: Target) -> int:
    """Into how many rows of fewer columns to take each row of the weight and of x, for a few tokens.

    The smallest tile multiplies 8 tokens. With one token the other places hold the later pieces of its columns, and a
    row of the weight is eight rows of an eighth: the products of pieces that belong together, added up, are the result.
    So K is split without a second kernel. What counts as enough programs is reasoned, not measured on a GPU yet.
    """
    for fold in (8, 4, 2):
        whole = k % (fold * COLUMNS) == 0 and (k // fold) % group == 0
        if whole and m * fold <= _SMALLEST and n * fold >= _FOLDED_ROWS * target.processors:
            return fold
    return 1


def is_many(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> bool:
    """Whether `decoded_linear` is to multiply: there are many tokens, and it takes the call.

    For Turing, and for float32, Triton multiplies without tensor cores, in scalar code that spills: for Turing in all
    tiles, for float32 in those of 64 tokens and more.
    """
    target, many = device.target_of(x.device), MANY
    if target.kind == "cuda" and (x.dtype == torch.float32 or not target.assembles):
        many = _FEW + 1 if target.assembles else 1
    return x.numel() >= many * x.shape[-1] and decoded_linear.refuses(fmt, x, parts, bias, NAME) is None


def refuses_group(group: int) -> str | None:
    """Why groups of so many columns cannot be multiplied, or None."""
    if group % _STEP or (COLUMNS % group and group % COLUMNS):
        return (
            f"groups of {group} columns; the kernel takes multiples of {_STEP} that divide {COLUMNS}, or its multiples"
        )
    return None


def _exact_in(dtype: torch.dtype, scale: Tensor, stored: tl.constexpr) -> bool:
    """Whether scales lose nothing in the dtype of x, so that two weights can be scaled at a time."""
    if stored.value == E8M0.value:
        return dtype == torch.bfloat16  # float16 does not reach as far
    return stored.value == E4M3.value or scale.dtype == dtype


def _bytes(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale
