"""linear for w4a8_codebook: rows of the rotated activations to int8, then products of integers.

The weight's codes become int8 values where they are multiplied for few tokens; for many they are decoded once, and
`int8_gemm` multiplies. With a correction there is no integer product: the weight is decoded, and PyTorch multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import codebook_rows, decoded_linear, device, int8_gemm
from lowbit.backends.triton.codebook_rows import UNIT, integers
from lowbit.backends.triton.quantize_rows import quantize_rows
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook
from lowbit.numerics.groups import row_chunks

FEW = 32  # tokens up to which the fused kernel runs; where the two cross on a GPU has not been measured
_LARGEST = 32  # tokens of a tile
ELEMENTS = 1 << 27  # of a decoded piece: 128 MiB


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens holds all of them and little more.

    Where the codebook is read by loads of Triton's own, stages would copy every level to shared memory.
    """
    wanted = max(16, min(arguments["m_bucket"], _LARGEST))
    staged = bool(arguments["ASSEMBLE"])
    return [one for one in configs if one.constants["BLOCK_M"] == wanted and (one.stages > 1) == staged]


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, warps=4, stages=3),
        config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, warps=4, stages=3),
        config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, warps=8, stages=3),
        config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, warps=4, stages=3),
        config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, warps=8, stages=3),
        config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, warps=4, stages=1),
        config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, warps=4, stages=1),
    ],
    key=("m_bucket", "n", "k", "out", "splits", "BITS", "GROUP"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _linear_codes(
    x, x_scale, raw, s_rel, codebook, s_channel, bias, out, m, m_bucket, n, k, splits: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ASSEMBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x int8 [m, k] with x_scale [m]. With splits > 1 out is int32 sums [splits, m, n]."""
    COUNT: tl.constexpr = BLOCK_K // UNIT  # units of a row
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    unit, column = tl.arange(0, BLOCK_N * COUNT), tl.arange(0, BLOCK_K)
    unit_row = tl.minimum(tl.program_id(0) * BLOCK_N + unit // COUNT, n - 1)  # what lies beyond the last repeats it
    token = tl.minimum(tokens, m - 1)
    x_at = x + token[None, :].to(tl.int64) * k + column[:, None]
    steps = tl.cdiv(k, BLOCK_K)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(steps * split // splits, steps * (split + 1) // splits):
        start = step * BLOCK_K
        own = step * COUNT + unit % COUNT
        value = integers(
            raw, s_rel, codebook, unit_row, own, own < k // UNIT, k, BLOCK_N * COUNT, BITS, GROUP, ASSEMBLE
        )
        weight = tl.reshape(value, (BLOCK_N, BLOCK_K))
        part = tl.load(x_at + start, mask=(start + column < k)[:, None], other=0)
        sums = tl.dot(weight, part, sums, out_dtype=tl.int32)
    present = (tokens < m)[None, :] & (rows < n)[:, None]
    at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
    if splits == 1:
        row = tl.minimum(rows, n - 1)
        total = sums.to(tl.float32) * (tl.load(x_scale + token)[None, :] * tl.load(s_channel + row)[:, None])
        if bias is not None:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=present)
    else:
        tl.store(at, sums, mask=present)


def refuses(fmt: W4A8Codebook, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if why := device.refuses_product(x, bias=bias, **parts):
        return why
    if fmt.correction:
        return codebook_rows.refuses(fmt, parts, x.dtype)
    return codebook_rows.refuses_integers(parts) or int8_gemm.refuses(x, x.shape[-1])


@kernel("linear", format="w4a8_codebook", backend="triton", refuses=refuses, tolerance=3e-3)
def linear_w4a8_codebook(fmt: W4A8Codebook, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts, bias [N] or None -> [..., N] in the dtype of x.

    Given the codes of the activations, the sums are the reference's and so are the roundings behind them.
    """
    coded = codebook_rows.describe(fmt, parts, x.shape[-1])
    if fmt.correction:
        return decoded_linear.product_of(coded, x, bias)
    codes, row = quantize_rows(x, rotation=fmt.rotation)
    bias = None if bias is None else bias.contiguous()
    multiply = _fused if codes.shape[0] <= FEW else _decoded
    return multiply(codes, row, coded, bias, x.dtype).reshape(*x.shape[:-1], coded.n)


def _fused(a: Tensor, row: Tensor, coded: codebook_rows.Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes a [M, K] with scales `row` [M, 1] -> [M, N]; the weight is read once."""
    (m, k), n = a.shape, coded.n
    out = torch.empty((m, n), dtype=dtype, device=a.device)
    if not m or not n:
        return out
    scale = coded.parts["s_channel"]
    splits = int8_gemm.pieces_of(m, n, k, device.target_of(a.device), decodes=True)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.int32, device=a.device)
    _linear_codes(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        a.device, **coded.codes(0, n), x=a, x_scale=row, s_channel=scale, bias=bias, out=sums, m=m, m_bucket=bucket(m),
        n=n, k=k, splits=splits,
    )  # fmt: skip
    if splits > 1:
        int8_gemm.add_pieces(sums, row, scale, bias, out)
    return out


def _decoded(a: Tensor, row: Tensor, coded: codebook_rows.Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same for many tokens: the int8 weight is made first, some rows at a time."""
    out = torch.empty((a.shape[0], coded.n), dtype=dtype, device=a.device)
    for start, stop in row_chunks(coded.n, coded.k, elements=ELEMENTS):
        weight = torch.empty((stop - start, coded.k), dtype=torch.int8, device=a.device)
        coded.decode_integers(weight, start, stop)
        part = None if bias is None else bias[start:stop]
        made = int8_gemm.product(a, row, weight, coded.parts["s_channel"][start:stop], part, dtype)
        if stop - start == coded.n:
            return made
        out[:, start:stop] = made
    return out
