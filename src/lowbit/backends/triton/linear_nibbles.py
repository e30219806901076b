"""linear for 4-bit codes in plain parts: awq_w4a16, wna16, nvfp4 and mxfp4, with activations as they are.

    out[m, n] = alpha[n] * sum over k of x[m, k] * ((value(code) - offset) * scale + zero)  + bias[n]

Four bytes of a row are a word of eight columns: nibble j of word i is column 8 i + j. The decoder of words gives all
nibbles 0 of a block of 128 columns first, then all nibbles 1, and x is brought into that order instead of the weight:
for a product the order of columns does not matter. The weight is the left operand, decoded in registers and rounded
once to the dtype of x (`alpha` multiplies the float32 sums). With few tokens K is split over programs, whose float32
sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device, words
from lowbit.backends.triton.floats import e4m3_value, e8m0_value
from lowbit.backends.triton.split_sums import add_splits, splits_for, store_sums
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned

COLUMNS = 128  # of a block
_WORD = 8  # columns
_WGMMA = 9  # the major compute capability whose products take sums from where they are
WHOLE_ROW = 1 << 30  # columns of a group that no row is longer than
PLAIN, E4M3, E8M0 = (tl.constexpr(i) for i in range(3))  # what scales are stored as


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller.

    Of integer codes the largest spills where the sums and the weight are both in registers (mma).
    """
    target = device.target_of(arguments["x"].device)
    in_registers = target.kind == "cuda" and target.capability[0] != _WGMMA and not device.tensor_memory(target)
    largest = 64 if in_registers and arguments["CODE"].value == words.INTEGERS.value else 128
    wanted = max(16, min(arguments["m_bucket"], largest))
    return [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted] or list(configs[:1])


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=64, warps=2, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=3),
        config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=3),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "k", "x", "scale", "zero", "offset", "CODE", "GROUP", "splits"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _linear_nibbles(
    x, codes, scale, zero, offset, alpha, bias, out, m, m_bucket, n, k, width, row_step, scale_row, scale_group, groups,
    splits: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    ROW_ALPHA: tl.constexpr, ASSEMBLE: tl.constexpr, HALF_SCALES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    # Scales that make normal numbers of tiny codes, but for 2**7: the largest, 448, would pass what the dtype can hold.
    RAISE: tl.constexpr = 1.0 if CODE != words.TINY_E2M1 else 2.0**119 if dtype == tl.bfloat16 else 2.0**7
    loaded = tl.where(rows < n, rows, 0).to(tl.int64)  # rows beyond the last repeat row 0: no mask in the loop
    present = (tokens < m)[:, None]
    word = tl.arange(0, 16)[None, :]
    column = tl.arange(0, 128)[None, :]
    code_at = codes + loaded[:, None] * row_step + word
    x_at = x + tokens[:, None].to(tl.int64) * k + column
    scale_at = loaded[:, None] * scale_row
    blocks = tl.cdiv(k, 128)
    first = blocks * split // splits
    last = blocks * (split + 1) // splits
    tl.assume(first < last)  # else the compiler, for what skips the loop, lets each product of Hopper's end at once
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Scales are read one block ahead: they are too small for copies that go on by themselves.
    next_scale = _of_block(scale, scale_at, first, scale_group, groups, GROUP, RAGGED)
    if zero is not None:
        next_zero = _of_block(zero, scale_at, first, scale_group, groups, GROUP, RAGGED)
    if offset is not None:
        next_offset = _of_block(offset, scale_at, first, scale_group, groups, GROUP, RAGGED)
    for block in range(first, last):
        factor = _by_word(_factor(next_scale, SCALE, RAISE, HALF_SCALES, dtype))
        added = None if zero is None else _by_word(next_zero.to(dtype if HALF_SCALES else tl.float32))
        lowered = None if offset is None else _by_word((next_offset.to(tl.float32) - 8.0).to(dtype))
        ahead = tl.minimum(block + 1, last - 1)
        next_scale = _of_block(scale, scale_at, ahead, scale_group, groups, GROUP, RAGGED)
        if zero is not None:
            next_zero = _of_block(zero, scale_at, ahead, scale_group, groups, GROUP, RAGGED)
        if offset is not None:
            next_offset = _of_block(offset, scale_at, ahead, scale_group, groups, GROUP, RAGGED)
        if RAGGED:
            stored = tl.load(code_at + block * 16, mask=block * 16 + word < width, other=0)
            part = tl.load(x_at + block * 128, mask=present & (block * 128 + column < k), other=0.0)
        else:
            stored = tl.load(code_at + block * 16)
            part = tl.load(x_at + block * 128, mask=present, other=0.0)
        values = words.decode(stored, CODE, dtype, ASSEMBLE)
        weights = ()
        for j in tl.static_range(8):
            weight = _weight(values[j], factor, added, lowered, HALF_SCALES, dtype)
            weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        by_nibble = tl.reshape(tl.permute(tl.reshape(part, (BLOCK_M, 16, 8)), (0, 2, 1)), (BLOCK_M, 128))
        sums = tl.dot(_side_by_side(weights, BLOCK_N), tl.trans(by_nibble), sums)
    if CODE == words.TINY_E2M1:
        sums *= 128.0
    store_sums(sums, alpha, bias, out, rows, tokens, split, m, n, splits, ROW_ALPHA)


@triton.jit
def _of_block(values, at, block, step, groups, GROUP: tl.constexpr, RAGGED: tl.constexpr):
    """What is stored by group for a block of columns: [rows, groups of the block]."""
    if GROUP >= 128:
        return tl.load(values + at + (block * 128 // GROUP).to(tl.int64) * step)
    else:  # not after it: Triton compiles what stands behind a return, too
        group = (block * (128 // GROUP) + tl.arange(0, 128 // GROUP))[None, :]
        if RAGGED:
            return tl.load(values + at + group.to(tl.int64) * step, mask=group < groups, other=0)
        else:
            return tl.load(values + at + group.to(tl.int64) * step)


@triton.jit
def _factor(stored, SCALE: tl.constexpr, RAISE: tl.constexpr, HALF_SCALES: tl.constexpr, DTYPE: tl.constexpr):
    """What is stored, as what a value is multiplied by, times RAISE: in DTYPE where nothing is lost, or in float32."""
    if SCALE == E4M3:
        factor = e4m3_value(stored.to(tl.int32))
    elif SCALE == E8M0:
        factor = e8m0_value(stored.to(tl.int32))
    else:
        factor = stored.to(tl.float32)
    if RAISE != 1.0:
        factor *= RAISE
    return factor.to(DTYPE) if HALF_SCALES else factor


@triton.jit
def _by_word(tile):
    """[rows, groups of a block] -> [rows, 16]: the value of each word."""
    rows: tl.constexpr = tile.shape[0]
    groups: tl.constexpr = tile.shape[1]
    return tl.reshape(tl.broadcast_to(tile[:, :, None], (rows, groups, 16 // groups)), (rows, 16))


@triton.jit
def _weight(value, factor, added, lowered, HALF_SCALES: tl.constexpr, DTYPE: tl.constexpr):
    """(value - lowered) * factor + added, rounded once: [rows, 16] each."""
    if lowered is not None:
        value -= lowered  # exact: both are small integers
    if HALF_SCALES:
        return value * factor if added is None else tl.fma(value, factor, added)
    weight = value.to(tl.float32) * factor
    if added is not None:
        weight += added
    return weight.to(DTYPE)


@triton.jit
def _side_by_side(parts, ROWS: tl.constexpr):
    """Eight tensors [rows, 16] -> [rows, 128], one behind the other; no value moves to another thread."""
    low = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
    high = tl.join(tl.join(parts[4], parts[5]), tl.join(parts[6], parts[7]))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), (ROWS, 128))


def product(
    x: Tensor, codes: Tensor, scale: Tensor, *, group: int, steps: tuple[int, int], code: tl.constexpr,
    stored: tl.constexpr, zero: Tensor | None = None, offset: Tensor | None = None, alpha: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] of 16 bits, codes int32 [N, ceil(K / 8)] -> [..., N] in the dtype of x.

    scale, zero and offset: in memory alike, `steps` apart from a row to the next and from a group to the next.
    alpha [] or [N], bias [N].
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = rows.shape, codes.shape[0]
    target = device.target_of(x.device)
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    bias = None if bias is None else bias.contiguous()
    alpha = None if alpha is None else alpha.contiguous()
    half = target.assembles and _exact_in(x.dtype, scale, stored) and (zero is None or zero.dtype == x.dtype)
    if half and code.value == words.E2M1.value and stored.value == E4M3.value:
        code = words.TINY_E2M1
    splits = splits_for(m, n, triton.cdiv(k, COLUMNS), target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    _linear_nibbles(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        x.device, x=rows, codes=codes, scale=scale, zero=zero, offset=offset, alpha=alpha, bias=bias, out=sums, m=m,
        m_bucket=bucket(m), n=n, k=k, width=codes.shape[1], row_step=codes.stride(0), scale_row=steps[0],
        scale_group=steps[1], groups=triton.cdiv(k, group), splits=splits, CODE=code, SCALE=stored, GROUP=group,
        RAGGED=k % COLUMNS != 0, ROW_ALPHA=alpha is not None and alpha.numel() > 1, ASSEMBLE=target.assembles,
        HALF_SCALES=half,
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, alpha, bias, out)
    return out


def fits(group: int, codes: Tensor) -> bool:
    """Whether the kernel takes groups of so many columns and codes (bytes [N, ...]) that lie like this."""
    aligned = codes.stride(1) == 1 and codes.stride(0) % 4 == codes.shape[1] % 4 == codes.data_ptr() % 4 == 0
    return aligned and group % _WORD == 0 and (COLUMNS % group == 0 or group % COLUMNS == 0)


def _exact_in(dtype: torch.dtype, scale: Tensor, stored: tl.constexpr) -> bool:
    """Whether scales lose nothing in the dtype of x, so that two weights can be scaled at a time."""
    if stored.value == E8M0.value:
        return dtype == torch.bfloat16  # float16 does not reach as far
    return stored.value == E4M3.value or scale.dtype == dtype
