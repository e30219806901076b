"""linear for convrot_w4a4: rows of activations rotated and quantized in one kernel, exact integer products in a second.

As in `svdquant_gemm`, the weight is the left operand and is decoded in registers, a nibble in the upper half of a byte
being 16 times its code, and activations come one byte a code with the even columns of 64 first. One scale a row and one
a token multiply the whole sum, so that int32 sums over all of K stay in the tensor cores (on Turing, float16 products
of 64 columns, which float32 sums exactly).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device, rotate_rows
from lowbit.backends.triton.rounding import magnitude, quotient
from lowbit.backends.triton.svdquant_gemm import HALVES, nibbles, offset_of, splits_of
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.convrot_w4a4 import LARGEST, ConvrotW4A4
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import round_up
from lowbit.numerics.int8_matmul import INT8_MAX, MIN_ACTIVATION_SCALE

MOST_COLUMNS = 1 << 16  # of products up to 16 * 8 * 127, which an int32 then holds
_SPAN = 64  # columns of which the even ones come first
_SMALLEST_SCALE = tl.constexpr(MIN_ACTIVATION_SCALE)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float of which the last bit is worth 1
_ROUND_BITS = tl.constexpr(0x4B400000)
_FEWEST, _MOST = 16, 128  # tokens of a tile
_ROWS = 16  # groups of columns in one product of a rotation, at least
_HELD, _PIECE = 16384, 8192  # columns of a row that stay in registers, and of a longer row at a time
_PLAIN_PIECES = 4  # of 64 columns, taken together where nothing is rotated


# ---- activations ----------------------------------------------------------------------------------------------------


@triton.jit
def _values(
    x, matrix, m, k, first, ROTATED: tl.constexpr, CUTS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """PIECES tensors float32 [TOKENS * GROUPS, 64] of the groups from `first` on; zeros outside of x."""
    row = tl.arange(0, TOKENS * GROUPS)
    token = tl.program_id(0) * TOKENS + row // GROUPS
    column = tl.arange(0, 64)
    if ROTATED:
        hadamard = tl.load(matrix + column[:, None] * 64 + column[None, :])
    parts = ()
    for piece in tl.static_range(PIECES):
        at = ((first + row % GROUPS) * PIECES + piece)[:, None] * 64 + column[None, :]
        inside = (token < m)[:, None] & (at < k)
        value = tl.load(x + token[:, None].to(tl.int64) * k + at, mask=inside, other=0.0)
        if ROTATED:
            parts += (rotate_rows.rotate(value, hadamard, CUTS),)  # type: ignore[assignment]
        else:
            parts += (value.to(tl.float32),)  # type: ignore[assignment]
    if ROTATED:
        parts = rotate_rows.combine(parts)
    return parts


@triton.jit
def _peak(parts, TOKENS: tl.constexpr, GROUPS: tl.constexpr):
    """The bits of the largest magnitude of each token."""
    found = magnitude(parts[0])
    for piece in tl.static_range(1, len(parts)):
        found = tl.maximum(found, magnitude(parts[piece]))
    return tl.max(tl.reshape(tl.max(found, axis=1), (TOKENS, GROUPS)), axis=1)


@tuned([config(warps=8, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _quantize_convrot(
    x, matrix, codes, scales, m, k, columns, LARGEST: tl.constexpr, ROTATED: tl.constexpr, CUTS: tl.constexpr,
    LOOPS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A program quantizes TOKENS rows, GROUPS groups of PIECES * 64 columns at a time. codes: [M, columns]."""
    if LOOPS == 1:
        parts = _values(x, matrix, m, k, 0, ROTATED, CUTS, TOKENS, GROUPS, PIECES)
        bits = _peak(parts, TOKENS, GROUPS)
    else:
        bits = tl.zeros((TOKENS,), tl.int32)
        for loop in range(LOOPS):
            some = _values(x, matrix, m, k, loop * GROUPS, ROTATED, CUTS, TOKENS, GROUPS, PIECES)
            bits = tl.maximum(bits, _peak(some, TOKENS, GROUPS))
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full((TOKENS,), 1.0 * LARGEST, tl.float32))
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)  # NaN stays
    alone = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tl.store(scales + alone, scale, mask=alone < m)
    row, byte = tl.arange(0, TOKENS * GROUPS), tl.arange(0, 32)
    token = tl.program_id(0) * TOKENS + row // GROUPS
    scale = tl.reshape(tl.broadcast_to(scale[:, None], (TOKENS, GROUPS)), (TOKENS * GROUPS, 1))
    reciprocal = tl.div_rn(tl.full((TOKENS * GROUPS, 1), 1.0, tl.float32), scale)
    for loop in range(LOOPS):
        if LOOPS > 1:
            parts = _values(x, matrix, m, k, loop * GROUPS, ROTATED, CUTS, TOKENS, GROUPS, PIECES)
        for piece in tl.static_range(PIECES):
            steps = quotient(parts[piece], scale, reciprocal)
            code = (steps + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS  # rounds half to even
            even, odd = tl.split(tl.reshape(code, (TOKENS * GROUPS, 32, 2)))
            left = ((loop * GROUPS + row % GROUPS) * PIECES + piece) * 64
            at = codes + (token.to(tl.int64) * columns + left)[:, None] + byte[None, :]
            inside = ((token < m) & (left < columns))[:, None]
            tl.store(at, even.to(tl.int8), mask=inside)
            tl.store(at + 32, odd.to(tl.int8), mask=inside)


def _quantized(x: Tensor, rotation: int, largest: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 codes [M, K rounded up to 64], of 64 the even columns first, and float32 scales [M]."""
    (m, k), target = x.shape, device.target_of(x.device)
    codes = torch.empty((m, round_up(k, _SPAN)), dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    pieces = rotate_rows.pieces(rotation) if rotation else _PLAIN_PIECES
    groups = triton.next_power_of_2(triton.cdiv(k, pieces * _SPAN))
    held = groups if k <= _HELD else max(1, _PIECE // (pieces * _SPAN))
    tokens = max(1, _ROWS // held)
    _quantize_convrot(
        lambda _: (triton.cdiv(m, tokens),),
        x.device, x=x, matrix=rotate_rows.matrix(rotation, x.dtype, target, x.device) if rotation else None,
        codes=codes, scales=scales, m=m, k=k, columns=codes.shape[1], LARGEST=largest, ROTATED=rotation > 0,
        CUTS=rotate_rows.cuts(x.dtype, target), LOOPS=triton.cdiv(triton.cdiv(k, pieces * _SPAN), held), TOKENS=tokens,
        GROUPS=held, PIECES=pieces,
    )  # fmt: skip
    return codes, scales


# ---- product --------------------------------------------------------------------------------------------------------


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens is not far larger than the number of tokens, nor far smaller; on Turing the first."""
    if arguments["HALVES"]:
        return configs[:1]
    wanted = max(_FEWEST, min(arguments["m_bucket"], _MOST))
    return [one for one in configs if wanted // 2 <= one.constants["BLOCK_M"] <= wanted] or list(configs[:1])


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=16, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=64, BLOCK_N=128, warps=4, stages=4),
        config(BLOCK_M=128, BLOCK_N=64, warps=4, stages=4),
        config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=4),
        config(BLOCK_M=128, BLOCK_N=256, warps=8, stages=3),
    ],
    key=("m_bucket", "n", "k", "out", "splits"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _convrot_product(
    x, x_scale, codes, scale, bias, out, m, m_bucket, n, k, splits: tl.constexpr, SPANS: tl.constexpr,
    RAGGED: tl.constexpr, HALVES: tl.constexpr, ASSEMBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row, token = tl.minimum(rows, n - 1), tl.minimum(tokens, m - 1)  # what lies beyond repeats the last: no masks
    byte = tl.arange(0, 32)
    spans = tl.cdiv(k, 64)
    # Where spans are whole, spans times bytes: so the compiler sees that each begins at a multiple of 32 bytes.
    row_bytes = k // 2 if RAGGED else spans * 32
    code_at = codes + row[:, None].to(tl.int64) * row_bytes + byte[None, :]
    x_at = x + token[None, :].to(tl.int64) * (spans * 64) + byte[:, None]
    steps = spans // SPANS
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(steps * split // splits, steps * (split + 1) // splits):
        for one in tl.static_range(SPANS):
            span = step * SPANS + one
            if RAGGED:
                packed = tl.load(code_at + span * 32, mask=(byte < k // 2 - span * 32)[None, :], other=0)
            else:
                packed = tl.load(code_at + span * 32)
            even, odd = nibbles(packed, ASSEMBLE)
            x_even, x_odd = tl.load(x_at + span * 64), tl.load(x_at + (span * 64 + 32))
            if HALVES:
                floats = tl.dot(even.to(tl.float16), x_even.to(tl.float16))
                sums += tl.dot(odd.to(tl.float16), x_odd.to(tl.float16), floats).to(tl.int32)
            else:
                sums = tl.dot(even, x_even, sums, out_dtype=tl.int32)
                sums = tl.dot(odd, x_odd, sums, out_dtype=tl.int32)
    sums = sums >> 4  # exact: all products were 16 times too large
    present = (tokens < m)[None, :] & (rows < n)[:, None]
    at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
    if splits == 1:
        total = sums.to(tl.float32) * (tl.load(x_scale + token)[None, :] * tl.load(scale + row)[:, None])
        if bias is not None:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=present)
    else:
        tl.store(at, sums, mask=present)


@tuned([config(BLOCK=512, warps=4, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _add_integers(sums, x_scale, scale, bias, out, m, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """A program adds a piece of a token."""
    across = tl.cdiv(n, BLOCK)
    token, row = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    at = token.to(tl.int64) * n + row
    size = m.to(tl.int64) * n
    added = tl.zeros((BLOCK,), tl.int32)
    for split in tl.static_range(SPLITS):
        added += tl.load(sums + split * size + at, mask=inside, other=0)
    total = added.to(tl.float32) * (tl.load(x_scale + token) * tl.load(scale + row, mask=inside, other=0.0))
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def refuses(fmt: ConvrotW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if x.shape[-1] > MOST_COLUMNS:
        return f"{x.shape[-1]} columns; sums of more than {MOST_COLUMNS} products could overflow an int32"
    return device.refuses_product(x, bias=bias, **parts)


@kernel("linear", format="convrot_w4a4", backend="triton", refuses=refuses, tolerance=3e-3)
def linear_convrot_w4a4(fmt: ConvrotW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x.

    Without a rotation the result is the reference's, bit for bit; a rotation sums in another order than a matrix
    product does, so that a code of the activations may be the next one where its value lies between the two.
    """
    rows, qdata, scale = x.reshape(-1, x.shape[-1]).contiguous(), parts["qdata"].contiguous(), parts["scale"]
    (m, k), n, target = rows.shape, qdata.shape[0], device.target_of(x.device)
    out = x.new_empty((*x.shape[:-1], n))
    if not out.numel():
        return out
    codes, x_scale = _quantized(rows, fmt.rotation, LARGEST if fmt.linear_dtype == "int4" else INT8_MAX)
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    spans = codes.shape[1] // _SPAN
    together = 2 if spans % 2 == 0 else 1
    splits = splits_of(m, n, spans // together, target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.int32, device=x.device)
    _convrot_product(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        x.device, x=codes, x_scale=x_scale, codes=qdata, scale=scale, bias=bias, out=sums, m=m, m_bucket=bucket(m),
        n=n, k=k, splits=splits, SPANS=together, RAGGED=k % _SPAN > 0,
        HALVES=offset_of(target) == HALVES, ASSEMBLE=target.assembles,
    )  # fmt: skip
    if splits > 1:
        _add_integers(
            lambda meta: (triton.cdiv(n, meta["BLOCK"]) * m,),
            x.device, sums=sums, x_scale=x_scale, scale=scale, bias=bias, out=out, m=m, n=n, SPLITS=splits,
        )  # fmt: skip
    return out
