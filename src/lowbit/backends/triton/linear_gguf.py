"""linear for gguf: blocks are decoded where they are multiplied for few tokens, else once, and PyTorch multiplies.

    out[m, n] = global_scale * sum over k of x[m, k] * weight[n, k]  + bias[n]

A weight is decoded as ggml does it and rounded once to the dtype of x. A program reads some bytes of codes of each of
its rows at a time, every byte once; the codes at one place of these bytes, a piece, are one product, with x read in the
order of their columns. With few tokens K is split over programs, whose float32 sums a second kernel adds in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, gguf_blocks, gguf_rows
from lowbit.backends.triton.split_sums import add_splits, splits_for, store_sums
from lowbit.backends.triton.tuning import Arguments, Config, bucket, config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import ceil_div

FEW = 32  # tokens up to which the fused kernel runs; where the two cross on a GPU has not been measured
_LARGEST = 32  # tokens of a tile
_STEP = 64  # bytes of codes of a row that every config takes at a time, or a multiple


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """Those whose tile of tokens holds all of them and little more."""
    wanted = max(16, min(arguments["m_bucket"], _LARGEST))
    return [one for one in configs if one.constants["BLOCK_M"] == wanted]


@tuned(
    [
        config(BLOCK_M=16, BLOCK_N=64, BYTES=64, warps=8, stages=3),
        config(BLOCK_M=16, BLOCK_N=64, BYTES=64, warps=4, stages=3),
        config(BLOCK_M=16, BLOCK_N=32, BYTES=64, warps=4, stages=3),
        config(BLOCK_M=32, BLOCK_N=64, BYTES=64, warps=8, stages=3),
        config(BLOCK_M=32, BLOCK_N=64, BYTES=64, warps=4, stages=3),
    ],
    key=("m_bucket", "n", "k", "x", "splits", "KIND"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _linear_blocks(
    x, raw, halves, alpha, bias, out, m, m_bucket, n, k, splits: tl.constexpr, KIND: tl.constexpr, RAGGED: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """RAGGED: the bytes of codes of a row are no multiple of those of every config."""
    HELD: tl.constexpr = KIND.columns * KIND.bits // 8  # bytes of codes of a block
    PIECES: tl.constexpr = 8 // KIND.bits
    dtype: tl.constexpr = x.dtype.element_ty
    row, tokens = tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    left = tl.program_id(0) * BLOCK_N
    blocks = k // KIND.columns  # of a row
    raw += left.to(tl.int64) * blocks * KIND.size
    if halves is not None:
        halves += left.to(tl.int64) * blocks * (KIND.size // 2)
    first_block = (tl.minimum(row, n - 1 - left) * blocks)[:, None]  # rows beyond the last repeat it
    present = (tokens < m)[None, :]
    x_at = x + tokens[None, :].to(tl.int64) * k
    unit, place = tl.arange(0, BYTES // LANES)[None, :], tl.arange(0, BYTES)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    steps = tl.cdiv(blocks * HELD, BYTES)
    for step in range(steps * split // splits, steps * (split + 1) // splits):
        start = step * (BYTES // LANES) + unit
        block, byte = start * LANES // HELD, start * LANES % HELD
        x_block, x_byte = (step * BYTES + place) // HELD, (step * BYTES + place) % HELD
        if RAGGED:
            inside, read = block < blocks, present & (x_block < blocks)[:, None]
        else:  # not before the loop: Triton 3.6 wants what the first turn finds to be of the kind of later ones
            inside, read = None, present
        packed = gguf_blocks.load_unit(raw, first_block + block, byte, inside, LANES, KIND)
        for piece in tl.static_range(PIECES):
            weight = gguf_blocks.values(raw, halves, packed, first_block + block, byte, inside, piece, LANES, KIND)
            weight = tl.reshape(weight.to(dtype), (BLOCK_N, BYTES))
            column = x_block * KIND.columns + gguf_blocks.column_of(x_byte, piece, KIND)
            column = tl.max_contiguous(tl.multiple_of(column, LANES), LANES)
            part = tl.load(x_at + column[:, None], mask=read, other=0.0)
            sums = tl.dot(weight, part, sums)
    store_sums(sums, alpha, bias, out, left + row, tokens, split, m, n, splits, False)


def refuses(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses_product(x, bias=bias, **parts) or gguf_rows.refuses(fmt, parts, x.dtype)


@kernel("linear", format="gguf", backend="triton", refuses=refuses, tolerance=6e-3)
def linear_gguf(fmt: GgufBlock, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts, bias [N] or None -> [..., N] in the dtype of x."""
    if not _is_fused(x):
        return decoded_linear.product_of(gguf_rows.describe(fmt, parts, x.shape[-1]), x, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = rows.shape, parts["qdata"].shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    target, kind = device.target_of(x.device), gguf_blocks.kind_of(fmt.type)
    raw, halves = gguf_blocks.views(parts["qdata"], kind)
    bias = None if bias is None else bias.contiguous()
    held, alpha = k // kind.columns * gguf_blocks.held(kind), parts.get("global_scale")
    splits = splits_for(m, n, ceil_div(held, 2 * _STEP), target)
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    _linear_blocks(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), splits),
        x.device, x=rows, raw=raw, halves=halves, alpha=alpha, bias=bias, out=sums, m=m, m_bucket=bucket(m), n=n, k=k,
        splits=splits, KIND=kind, RAGGED=held % _STEP != 0,
        LANES=min(16, kind.run),
    )  # fmt: skip
    if splits > 1:
        add_splits(sums, alpha, bias, out)
    return out


def _is_fused(x: Tensor) -> bool:
    """Whether the weight is decoded where it is multiplied."""
    target = device.target_of(x.device)
    if x.dtype == torch.float32 or (target.kind == "cuda" and not target.assembles):
        return False  # Triton multiplies these without tensor cores
    return x.numel() <= FEW * x.shape[-1]
