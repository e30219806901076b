"""linear for one byte a weight in plain rows, with activations as they are: fp8, mxfp8, and int8 that is only stored.

    out[m, n] = alpha[n] * sum over k of x[m, k] * value(code[n, k]) * scale[n, k]  + bias[n]

The weight is the left operand, decoded in registers; activations are the right one and go through shared memory. A
thread reads words of four codes, 16 of a row side by side, and multiplies them where they are: the columns of a tile
are taken in the order `_column`, of the weight by whom a word belongs to, of the activations by their addresses.

Codes are exact in the dtype of x. A scale of the tensor or of a row multiplies the float32 sums, and so does that of a
block as wide as a tile, or wider, tile by tile. Others, such as the powers of two of mxfp8, multiply the value, which
is then rounded once: for powers of two in bfloat16 that is exact. With few tokens K is split over programs, whose
float32 sums a second kernel adds in a fixed order; with many (`MANY`), and for float32, `decoded_linear` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import bytes_values, decoded_linear, device
from lowbit.backends.triton.floats import e8m0_value
from lowbit.backends.triton.split_sums import add_splits, splits_for, store_sums
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.formats.base import Format
from lowbit.formats.granular import Granular
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import ceil_div

MANY = 512  # tokens from which decoding once pays: by the traffic of both ways, not yet measured
_TILE = 128  # columns
_OLD_TILE = 32  # on Turing, for whose tensor cores Triton has no code: what its registers hold
_FEW = 16  # tokens up to which the smallest tile is the only sensible one
_UNORDERED = 32  # tokens up to which their columns are put in order by addresses, pairs at a time: no kernel more
_UNSCALED, _SUMS, _VALUES = (tl.constexpr(i) for i in range(3))  # what a scale of blocks multiplies


@dataclass(frozen=True)
class Blocks:
    """Scales of tiles of rows x columns: `scale` is float32 or, as uint8, codes of e8m0, [ceil(N / rows), groups]."""

    scale: Tensor
    rows: int
    columns: int


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller, and fits registers."""
    if arguments["BLOCK_K"] < _TILE:
        return configs[:1]
    wanted = max(_FEW, min(arguments["m_bucket"], 128))
    found = [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted] or list(configs[:1])
    if arguments["SCALED"] == _SUMS.value or arguments["x"].dtype == torch.float32:  # two tiles of sums
        found = [one for one in found if one.constants["BLOCK_M"] * one.constants["BLOCK_N"] <= 128 * 128]
    return found


@triton.jit
def _column(at):
    """Where in a tile of the weight the column `at` of the product lies.

    Of 16 columns of a product on tensor cores, thread t of four holds 2 t and 2 t + 1, and those 8 on. Of 64 of the
    weight it reads 16 side by side: four words, two pairs a word, for the four products one after the other.
    """
    thread, product, pair = (at % 8) // 2, (at % 64) // 16, (at % 16) // 8
    found = at // 64 * 64 + thread * 16 + product * 4 + pair * 2 + at % 2
    return tl.max_contiguous(tl.multiple_of(found, 2), 2)


@triton.jit
def _in_order(value, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Four tensors [BLOCK_N, BLOCK_K / 4], one a byte -> [BLOCK_N, BLOCK_K] with the columns in the order `_column`."""
    pairs = tl.join(tl.join(value[0], value[1]), tl.join(value[2], value[3]))  # [N, K/4, place in a pair, pair]
    split = tl.reshape(pairs, (BLOCK_N, BLOCK_K // 64, 4, 4, 2, 2))  # of K/4: thread, product
    return tl.reshape(tl.permute(split, (0, 1, 3, 5, 2, 4)), (BLOCK_N, BLOCK_K))


@triton.jit
def _scale_value(stored):
    if stored.dtype == tl.float32:
        return stored
    return e8m0_value(stored.to(tl.int32))


@triton.jit
def _four_factors(word, BLOCK_N: tl.constexpr, ELEMENTS: tl.constexpr):
    """int32 [BLOCK_N], four codes of e8m0 each -> float32 [BLOCK_N, ELEMENTS], a fourth of a row for each code.

    Joined, not looked up by position: so the compiler sees that a thread needs few of them, and where.
    """
    first, second = e8m0_value(word & 255), e8m0_value((word >> 8) & 255)
    third, fourth = e8m0_value((word >> 16) & 255), e8m0_value((word >> 24) & 255)
    four = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BLOCK_N, 4))
    wide = tl.broadcast_to(tl.expand_dims(four, 2), (BLOCK_N, 4, ELEMENTS // 4))
    return tl.reshape(wide, (BLOCK_N, ELEMENTS))


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=8, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=64, BLOCK_N=128, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=256, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=256, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "k", "x", "splits", "CODE", "SCALED", "GROUP", "WORDS"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _linear_bytes(
    x, codes, scale, alpha, bias, out, m, m_bucket, n, k, width, groups, splits: tl.constexpr,
    CODE: tl.constexpr, WORDS: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    FOUR_SCALES: tl.constexpr, ORDERED: tl.constexpr, RAGGED: tl.constexpr, ROW_ALPHA: tl.constexpr,
    PROGRAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    loaded = tl.where(rows < n, rows, 0)  # rows beyond the last repeat row 0: no mask in the loop
    present = (tokens < m)[None, :]
    at = tl.arange(0, BLOCK_K)
    UNIT: tl.constexpr = 4 if WORDS else 1  # columns of an element of `codes`
    column = _column(at) if WORDS and not ORDERED else at
    unit = tl.arange(0, BLOCK_K // UNIT)
    code_at = codes + loaded[:, None].to(tl.int64) * (width // UNIT) + unit[None, :]
    x_at = x + tokens[None, :].to(tl.int64) * k + column[:, None]
    if SCALED != _UNSCALED:
        scale_row = scale + (loaded // BLOCK_ROWS).to(tl.int64) * groups
    blocks = tl.cdiv(width, BLOCK_K)
    first = (blocks * split // splits).to(tl.int32)
    last = (blocks * (split + 1) // splits).to(tl.int32)
    tl.assume(first < last)  # else the compiler, for what skips the loop, lets each product of Hopper's end at once
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        start = block * BLOCK_K
        if RAGGED:  # a code beyond the last column might be that of NaN, which zero does not silence
            code = tl.load(code_at + block * (BLOCK_K // UNIT), mask=(start + unit * UNIT < width)[None, :], other=0)
            part = tl.load(x_at + start, mask=present & (start + column < k)[:, None], other=0.0)
        else:
            code = tl.load(code_at + block * (BLOCK_K // UNIT))
            part = tl.load(x_at + start, mask=present, other=0.0)
        factor = None
        if SCALED == _VALUES:
            if FOUR_SCALES:
                factor = _four_factors(tl.load(scale_row + block), BLOCK_N, BLOCK_K // UNIT)
            else:
                group = (start + unit * UNIT) // GROUP
                stored = tl.load(scale_row[:, None] + group[None, :], mask=(group < groups)[None, :], other=0)
                factor = _scale_value(stored)
        if WORDS:
            weight = _in_order(bytes_values.decode(code, factor, CODE, dtype, PROGRAM), BLOCK_N, BLOCK_K)
        else:
            value = bytes_values.code_value(code.to(tl.int32) & 255, CODE)
            weight = (value if factor is None else value * factor).to(dtype)
        if SCALED == _SUMS:
            step = tl.broadcast_to(_scale_value(tl.load(scale_row + start // GROUP))[:, None], (BLOCK_N, BLOCK_M))
            sums = tl.fma(tl.dot(weight, part, input_precision="ieee"), step, sums)
        else:
            sums = tl.dot(weight, part, sums, input_precision="ieee")
    store_sums(sums, alpha, bias, out, rows, tokens, split, m, n, splits, ROW_ALPHA)


def linear(
    fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, *, code: tl.constexpr, blocks: Blocks | None = None
) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x, by the way for so many tokens.

    blocks: None for the scales of a `Granular` format.
    """
    if _decodes_once(x) and decoded_linear.refuses(fmt, x, parts, bias, "") is None:
        return decoded_linear.product(fmt, x, parts, bias, "")
    alpha = None
    if blocks is None and isinstance(fmt, Granular) and fmt.granularity == "block":
        blocks = Blocks(parts["scale"], *fmt.block_size)
    elif blocks is None:
        alpha = parts["scale"].reshape(-1)
    return product(x, parts["qdata"], code=code, alpha=alpha, blocks=blocks, bias=bias)


def refuses(x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why a product cannot run here, or None."""
    for name, tensor in {**parts, "bias": bias}.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} has gaps between its elements; the kernel reads contiguous tensors: call .contiguous() once"
    return device.refuses_product(x, bias=bias, **parts)


def _decodes_once(x: Tensor) -> bool:
    """Whether tokens are many, or float32 on a GPU whose tensor cores would round them: PyTorch multiplies better."""
    if x.dtype == torch.float32 and device.target_of(x.device).assembles:
        return x.numel() > 0
    return x.numel() >= MANY * x.shape[-1]


def product(
    x: Tensor, qdata: Tensor, *, code: tl.constexpr, alpha: Tensor | None = None, blocks: Blocks | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K], codes [N, K or more] of one byte, alpha [] or [N], bias [N] -> [..., N] in the dtype of x.

    Codes beyond column K must stand for zero.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), (n, width) = rows.shape, qdata.shape
    target = device.target_of(x.device)
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    old = target.kind == "cuda" and not target.assembles
    tile = _OLD_TILE if old else _TILE
    words = not old and width % 4 == 0 and (blocks is None or blocks.columns % 4 == 0) and _aligned(qdata)
    splits = splits_for(m, n, ceil_div(width, _TILE), target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    scaled = _scaling(blocks, width, four=not old)
    ordered = words and m > _UNORDERED and k % 64 == 0 and k == width
    _linear_bytes(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        x.device, x=_ordered(rows) if ordered else rows, codes=qdata.view(torch.int32 if words else torch.int8),
        alpha=alpha, bias=bias, out=sums, m=m, m_bucket=bucket(m), n=n, k=k, width=width, splits=splits,
        CODE=code.value, WORDS=words, **scaled, ORDERED=ordered, RAGGED=k % tile != 0 or width % tile != 0,
        ROW_ALPHA=alpha is not None and alpha.numel() > 1,
        PROGRAM=bytes_values.program(code, x.dtype, target, scaled=scaled["SCALED"] == _VALUES.value) if words else "",
        BLOCK_K=tile,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, alpha, bias, out)
    return out


def _scaling(blocks: Blocks | None, width: int, *, four: bool) -> dict[str, Any]:
    """The kernel's arguments that say where scales of blocks are and what they multiply."""
    if blocks is None:
        return {"scale": None, "groups": 0, "SCALED": 0, "GROUP": 0, "BLOCK_ROWS": 1, "FOUR_SCALES": False}
    scale, groups = blocks.scale, blocks.scale.shape[1]
    shape = {"GROUP": blocks.columns, "BLOCK_ROWS": blocks.rows}
    if blocks.columns % _TILE == 0 or blocks.columns >= width:
        group = blocks.columns if blocks.columns % _TILE == 0 else ceil_div(width, _TILE) * _TILE
        return {"scale": scale, "groups": groups, "SCALED": _SUMS.value, **shape, "GROUP": group, "FOUR_SCALES": False}
    four = four and scale.dtype == torch.uint8 and 4 * blocks.columns == _TILE and groups % 4 == 0 and _aligned(scale)
    if four:
        scale, groups = scale.view(torch.int32), groups // 4
    return {"scale": scale, "groups": groups, "SCALED": _VALUES.value, **shape, "FOUR_SCALES": four}


def _ordered(rows: Tensor) -> Tensor:
    """The columns of [M, K] as the kernel takes them: `_column`, by copying pairs."""
    rows = rows.clone() if rows.storage_offset() % 2 else rows  # pairs begin at a multiple of their size
    pairs = rows.view(torch.int32 if rows.dtype.itemsize == 2 else torch.int64)
    return pairs.view(-1, 4, 4, 2).permute(0, 2, 3, 1).reshape(pairs.shape).view(rows.dtype)


def _aligned(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.data_ptr() % 4 == 0
