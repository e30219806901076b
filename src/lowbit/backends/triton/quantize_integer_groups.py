"""quantize for awq_w4a16 and for wna16 of 4 and 8 bits, with the reference's codes and scales, bit for bit.

One pass where groups are short: a program holds ROWS rows of GROUPS groups. Of long groups (whole rows, with
group_size=0) it reads PIECE columns at a time, and the group twice, the second time from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, rounding
from lowbit.backends.triton.tuning import Arguments, Config, config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import LEVELS, MIDDLE, MIN_STORED_SCALE, AwqW4A16
from lowbit.formats.parts import Parts
from lowbit.formats.wna16 import WNA16
from lowbit.numerics.groups import ceil_div, round_up

_MULTIPLE = 16  # of columns in a group, unless one group is a whole row
_LONGEST = 2048  # columns of a group that a program holds at once
_VALUES = 4096  # that it should have
_INFINITE = tl.constexpr(float("inf"))
_MIDDLE, _STEPS = tl.constexpr(MIDDLE), tl.constexpr(LEVELS - 1)
_SMALLEST = tl.constexpr(MIN_STORED_SCALE)


@triton.jit
def _piece(w, row, index, first, n, k, SIZE: tl.constexpr, EVEN: tl.constexpr, PIECE: tl.constexpr):
    """Columns [1, GROUPS, PIECE] of a piece of each group, which lie within the weight, and its values as float32."""
    inner = first + tl.arange(0, PIECE)[None, None, :]
    column = index * SIZE + inner
    if EVEN:  # whole groups are in or out, so that loads need not look at single values
        inside = (row < n) & (index * SIZE < k) & (inner < SIZE)
    else:
        inside = (row < n) & (column < k) & (inner < SIZE)
    return column, inside, tl.load(w + row * k + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _extremes(value, inside, FILL: tl.constexpr):
    """The smallest and the largest value of each group [ROWS, GROUPS, 1]; FILL: there are gaps, which do not count."""
    low = tl.min(tl.where(inside, value, _INFINITE) if FILL else value, axis=2, keep_dims=True)
    high = tl.max(tl.where(inside, value, -_INFINITE) if FILL else value, axis=2, keep_dims=True)
    return low, high


@triton.jit
def _worst(value, BY_GROUP: tl.constexpr):
    """The bits of the largest magnitude of each group [ROWS, GROUPS, 1], or of all."""
    bits = rounding.magnitude(value)
    if BY_GROUP:
        return tl.max(bits, axis=2, keep_dims=True)
    else:
        return tl.max(tl.reshape(bits, (bits.shape[0] * bits.shape[1] * bits.shape[2],)), axis=0)


@triton.jit
def _by_constant(value, divisor: tl.constexpr):
    """value / divisor; quotients too small to be exact here are smaller than any scale."""
    return rounding.quotient(value, divisor, 1.0 / divisor)


def _for_size(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Programs of about 4096 values; of long groups, one in one row."""
    piece = arguments["PIECE"]
    rows = (1,) if piece * 4 > _VALUES else (16, 8, 4)
    return [one for one in configs if one.constants["ROWS"] in rows][:3]


@tuned(
    [config(ROWS=16, warps=4), config(ROWS=8, warps=4), config(ROWS=4, warps=4), config(ROWS=1, warps=4)],
    key=("n", "k", "w", "SIZE", "BITS", "AWQ"),
    prune=_for_size,
)
@triton.jit
def _encode_groups(
    w, noise, qdata, scales, zeros, flag, n, k, groups, stored, most, SIZE: tl.constexpr, AWQ: tl.constexpr,
    BITS: tl.constexpr, EVEN: tl.constexpr, LOOPS: tl.constexpr, PIECE: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """SIZE: columns of a group; EVEN: it divides K; stored: bytes of a row; most: the largest scale."""
    GROUPS: tl.constexpr = 1 if ROWS * PIECE >= VALUES else VALUES // (ROWS * PIECE)
    TOP: tl.constexpr = (1 << BITS) - 1  # the largest code
    HALF: tl.constexpr = 1 << (BITS - 1)  # the code that stands for 0, without zero points
    across = tl.cdiv(groups, GROUPS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    index = (tl.program_id(0) % across) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    known = (row < n) & (index < groups)
    column, inside, value = _piece(w, row, index, 0, n, k, SIZE, EVEN, PIECE)
    FILL: tl.constexpr = AWQ and SIZE != PIECE
    BY_GROUP: tl.constexpr = not AWQ and zeros is None
    low, high = _extremes(value, inside, FILL)
    bits = _worst(value, BY_GROUP)
    for loop in range(1, LOOPS):
        column, inside, value = _piece(w, row, index, loop * PIECE, n, k, SIZE, EVEN, PIECE)
        lower, higher = _extremes(value, inside, FILL)
        low, high = tl.minimum(low, lower), tl.maximum(high, higher)
        bits = tl.maximum(bits, _worst(value, BY_GROUP))
    worst = tl.max(tl.max(tl.reshape(bits, (ROWS, GROUPS)), axis=1), axis=0) if BY_GROUP else bits
    tl.store(flag, 1, mask=worst >= rounding.INFINITY)
    if AWQ:
        low, high = tl.where(known, low, 0.0), tl.where(known, high, 0.0)
        by_group = index.to(tl.int64) * n + row
        step = tl.maximum(_by_constant(high * 0.5 - low * 0.5, _STEPS / 2), _SMALLEST)
        zero = rounding.store_rounded(zeros + by_group, low + _MIDDLE * step, known)
        step = rounding.store_rounded(scales + by_group, step, known)
        reciprocal = tl.div_rn(1.0, step)
    else:
        by_group = row * groups + index
        if zeros is None:
            step = _by_constant(bits.to(tl.float32, bitcast=True), HALF - 1.0)
        else:
            low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)  # the range holds 0
            step = _by_constant(high, TOP + 0.0) - _by_constant(low, TOP + 0.0)
        step = tl.minimum(tl.maximum(step, _SMALLEST), most)
        step = rounding.store_rounded(scales + by_group, step, known)
        reciprocal = tl.div_rn(1.0, step)
        if zeros is not None:
            point = tl.minimum(tl.maximum(rounding.quotient(-low, step, reciprocal), 0.0), TOP + 0.0)
            point = rounding.half_even(point)
            tl.store(zeros + by_group, point.to(tl.uint8), mask=known)
            zero = point.to(tl.float32)
    for loop in range(LOOPS):
        if LOOPS > 1:
            column, inside, value = _piece(w, row, index, loop * PIECE, n, k, SIZE, EVEN, PIECE)
        if AWQ:
            steps = rounding.quotient(value - zero, step, reciprocal) + _MIDDLE
        else:
            steps = rounding.quotient(value, step, reciprocal)
            if zeros is not None:
                steps = steps + zero
        if noise is not None:
            steps = tl.floor(steps + tl.load(noise + row * k + column, mask=inside, other=0.0))
        if AWQ or zeros is not None:
            code = rounding.half_even(tl.minimum(tl.maximum(steps, 0.0), TOP + 0.0))
        else:
            code = rounding.half_even(tl.minimum(tl.maximum(steps, 1.0 - HALF), HALF - 1.0)) + HALF
        if BITS == 4:
            half = loop * (PIECE // 2) + tl.arange(0, PIECE // 2)[None, None, :]
            byte = index * (SIZE // 2) + half
            kept = known & (half < SIZE // 2)
            if not EVEN:
                kept = kept & (byte < stored)
            tl.store(qdata + row * stored + byte, rounding.nibbles(code, PIECE, False), mask=kept)
        else:
            kept = known & (loop * PIECE + tl.arange(0, PIECE)[None, None, :] < SIZE)
            if not EVEN:
                kept = kept & (column < stored)
            tl.store(qdata + row * stored + column, code.to(tl.uint8), mask=kept)


def refuses(fmt: AwqW4A16 | WNA16, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    """Why this call cannot run here, or None."""
    if isinstance(fmt, WNA16) and fmt.bits not in {4, 8}:
        return f"codes of {fmt.bits} bits; the encoder makes those of 4 and 8"
    if isinstance(fmt, AwqW4A16) and fmt.wzeros != "none":
        return "wzeros that are exact in 16 bits, which the encoder does not make"
    if fmt.group_size % _MULTIPLE:
        return f"groups of {fmt.group_size} columns; the encoder takes multiples of {_MULTIPLE}"
    return encoders.refuses(fmt, w, seed, where)


@kernel("quantize", format="awq_w4a16", backend="triton", refuses=refuses)
def quantize_awq_w4a16(fmt: AwqW4A16, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, rounded to nearest or, with a seed, stochastically."""
    source, parts, flag = encoders.begin(fmt, w, where)
    noise = encoders.noise_for(fmt, source, seed)
    zeros = encoders.stored(parts["zero"])
    _encode(source, noise, parts, zeros, flag, size=fmt.group_size, bits=4, most=0.0, awq=True)
    return encoders.finished(parts, flag, source, where)


@kernel("quantize", format="wna16", backend="triton", refuses=refuses)
def quantize_wna16(fmt: WNA16, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, rounded to nearest or, with a seed, stochastically."""
    source, parts, flag = encoders.begin(fmt, w, where)
    noise, k = encoders.noise_for(fmt, source, seed), source.shape[1]
    # A last group cut short, or a row that is one group, also has the columns that fill up its bytes.
    size = round_up(k, 8) if not fmt.group_size or fmt.group_size >= k else fmt.group_size
    most = fmt.largest_scale(parts["scale"].dtype)
    _encode(source, noise, parts, parts.get("zero_point"), flag, size=size, bits=fmt.bits, most=most, awq=False)
    if fmt.act_order:
        parts["g_idx"] = torch.arange(k, dtype=torch.int32, device=source.device) // fmt.group_size
    return encoders.finished(parts, flag, source, where)


def _encode(
    w: Tensor, noise: Tensor | None, parts: Parts, zeros: Tensor | None, flag: Tensor, *, size: int, bits: int,
    most: float, awq: bool,
) -> None:  # fmt: skip
    n, k = w.shape
    piece = min(encoders.power_of_two(size), _LONGEST)
    groups, stored = ceil_div(k, size), parts["qdata"].shape[1]

    def grid(meta: Arguments) -> tuple[int]:
        at_once = max(1, _VALUES // (meta["ROWS"] * piece))
        return (ceil_div(groups, at_once) * ceil_div(n, meta["ROWS"]),)

    _encode_groups(
        grid, w.device, w=w, noise=noise, qdata=parts["qdata"].view(torch.uint8),
        scales=encoders.stored(parts["scale"]), zeros=zeros, flag=flag, n=n, k=k, groups=groups,
        stored=stored, most=most, SIZE=size, AWQ=awq, BITS=bits,
        EVEN=k % size == 0, LOOPS=ceil_div(size, piece), PIECE=piece, VALUES=_VALUES,
    )  # fmt: skip
