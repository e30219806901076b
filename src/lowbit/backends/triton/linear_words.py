"""linear for 4-bit codes in the layout words128: awq_w4a16, wna16, nvfp4 and mxfp4, with activations as they are.

    out[m, n] = alpha[n] * sum over k of x[m, k] * ((value(code) - offset) * scale + zero)  + bias[n]

The weight is the left operand, decoded in registers; activations are the right one and go through shared memory. A
decoded weight is rounded once to the dtype of x (that of nvfp4 and mxfp4 is exact but for `alpha`, which multiplies the
float32 sums). With few tokens K is split over programs, whose float32 sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device, words
from lowbit.backends.triton.floats import e4m3_value, e8m0_value
from lowbit.backends.triton.split_sums import add_splits, splits_for
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.layouts.words128 import COLUMNS

PLAIN, E4M3, E8M0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what scales are stored as
_STEP = 16  # columns of one product
_FEW = 16  # tokens up to which the smallest tile is the only sensible one


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller."""
    m = arguments["m_bucket"]
    wanted = max(_FEW, min(m, 128))
    return [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted] or list(configs[:1])


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=8, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=256, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=256, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "k", "x", "scale", "splits"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _linear_words(
    x, codes, scale, zero, offset, alpha, bias, out, m, m_bucket, n, k, splits: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROW_ALPHA: tl.constexpr, ASSEMBLE: tl.constexpr,
    HALF_SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    inside = rows < n
    loaded = tl.where(inside, rows, 0)  # rows beyond the last repeat row 0: no mask in the loop
    present = (tokens < m)[None, :]
    word = tl.arange(0, 16)
    code_at = codes + loaded[:, None].to(tl.int64) * (k // 8) + word[None, :]
    x_at = x + tokens[None, :].to(tl.int64) * k + word[:, None]
    blocks = k // 128
    first = blocks * split // splits
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, blocks * (split + 1) // splits):
        values = words.decode(tl.load(code_at + block * 16), CODE, dtype, ASSEMBLE)
        for j in tl.static_range(8):
            group = (block * 128 + 16 * j) // GROUP
            at = group.to(tl.int64) * n + loaded
            if j == 0 or (16 * j) % GROUP == 0:
                factor = _scale(tl.load(scale + at), SCALE)
                if zero is not None:
                    added = tl.load(zero + at).to(tl.float32)
                if offset is not None:
                    lowered = tl.load(offset + at).to(tl.float32) - 8.0
            value = values[j]
            if offset is not None:
                value = (value.to(tl.float32) - lowered[:, None]).to(dtype)  # exact: both are small integers
            if zero is not None:
                if HALF_SCALES:
                    weight = tl.fma(
                        value,
                        tl.broadcast_to(factor.to(dtype)[:, None], (BLOCK_N, 16)),
                        tl.broadcast_to(added.to(dtype)[:, None], (BLOCK_N, 16)),
                    )
                else:
                    weight = (value.to(tl.float32) * factor[:, None] + added[:, None]).to(dtype)
            else:
                if HALF_SCALES:
                    weight = value * factor.to(dtype)[:, None]
                else:
                    weight = (value.to(tl.float32) * factor[:, None]).to(dtype)
            part = tl.load(x_at + block * 128 + 16 * j, mask=present, other=0.0)
            sums = tl.dot(weight, part, sums, input_precision="ieee")
    if splits == 1:
        if ROW_ALPHA:
            sums *= tl.load(alpha + loaded)[:, None]
        elif alpha is not None:
            sums *= tl.load(alpha)
        if bias is not None:
            sums += tl.load(bias + loaded).to(tl.float32)[:, None]
        at = out + tokens[None, :].to(tl.int64) * n + rows[:, None]
        tl.store(at, sums.to(out.dtype.element_ty), mask=present & inside[:, None])
    else:
        at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
        tl.store(at, sums, mask=present & inside[:, None])


@triton.jit
def _scale(stored, SCALE: tl.constexpr):
    if SCALE == E4M3:
        return e4m3_value(stored.to(tl.int32))
    if SCALE == E8M0:
        return e8m0_value(stored.to(tl.int32))
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
    if not m:
        return out
    assembles = target.assembles and x.dtype != torch.float32
    splits = splits_for(m, n, k // COLUMNS, target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    _linear_words(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        x.device, x=rows, codes=codes, scale=_bytes(scale), zero=zero, offset=offset, alpha=alpha, bias=bias, out=sums,
        m=m, m_bucket=bucket(m), n=n, k=k, splits=splits, CODE=code, SCALE=stored, GROUP=group,
        ROW_ALPHA=alpha is not None and alpha.numel() > 1, ASSEMBLE=assembles,
        HALF_SCALES=assembles and _exact_in(x.dtype, scale, stored),
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, alpha, bias, out)
    return out


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
