"""quantize for fp8_e4m3, fp8_e5m2 and int8, with the reference's codes and scales, bit for bit.

A program encodes one tile that shares a scale: a row or a block. It reads the tile twice, the second time from a cache.
A scale of the whole tensor is found first (`largest`); the tiles are then pieces of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, rounding
from lowbit.backends.triton.largest import largest
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.base import MIN_SCALE
from lowbit.formats.granular import Granular
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts
from lowbit.numerics.floats import divisor

_KINDS = {"fp8_e4m3": rounding.E4M3, "fp8_e5m2": rounding.E5M2, "int8": None}
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_PIECE = 4096  # of a weight that shares one scale


@triton.jit
def _place(row, column, tall, wide, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [ROWS, COLUMNS] of a piece of a tile from the tile's corner, and which lie within it."""
    rows = (row + tl.arange(0, ROWS))[:, None]
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    return rows.to(tl.int64) * k + columns, (rows < tall) & (columns < wide)


@tuned(
    [config(BLOCK=2048, warps=4), config(BLOCK=4096, warps=8), config(BLOCK=1024, warps=4)],
    key=("n", "k", "tall", "wide", "w", "out", "FIT"),
)
@triton.jit
def _encode_tiles(
    w, noise, scales, out, flag, n, k, across, tall, wide, KIND: tl.constexpr, LARGEST: tl.constexpr, FIT: tl.constexpr,
    CONVERTS: tl.constexpr, EVEN: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of `tall` rows and `wide` columns a program. TALL, WIDE: powers of two that hold them."""
    COLUMNS: tl.constexpr = min(BLOCK, WIDE)
    ROWS: tl.constexpr = min(BLOCK // COLUMNS, TALL)
    tile = tl.program_id(0)
    top, left = (tile // across).to(tl.int64) * tall, (tile % across).to(tl.int64) * wide
    tall, wide = tl.minimum(n - top, tall).to(tl.int32), tl.minimum(k - left, wide).to(tl.int32)
    corner = top * k + left
    if EVEN:
        corner, wide = tl.multiple_of(corner, 16), tl.multiple_of(wide, 16)
    if FIT:
        best = tl.zeros((ROWS, COLUMNS), tl.int32)
        for row in range(0, tall, ROWS):
            for column in range(0, wide, COLUMNS):
                offsets, inside = _place(row, column, tall, wide, k, ROWS, COLUMNS)
                value = tl.load(w + corner + offsets, mask=inside, other=0.0).to(tl.float32)
                best = tl.maximum(best, rounding.magnitude(value))
        bits = tl.max(tl.max(best, axis=1), axis=0)
        tl.store(flag, 1, mask=bits >= rounding.INFINITY)
        scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), LARGEST), _MIN_SCALE)
        tl.store(scales + tile, scale)
    else:
        scale = tl.load(scales)
    reciprocal = tl.div_rn(1.0, scale)
    for row in range(0, tall, ROWS):
        for column in range(0, wide, COLUMNS):
            offsets, inside = _place(row, column, tall, wide, k, ROWS, COLUMNS)
            value = tl.load(w + corner + offsets, mask=inside, other=0.0).to(tl.float32)
            steps = rounding.quotient(value, scale, reciprocal)
            added = None
            if noise is not None:
                added = tl.load(noise + corner + offsets, mask=inside, other=0.0)
            if KIND is None:
                if added is not None:
                    steps = tl.floor(steps + added)
                code = rounding.half_even(tl.minimum(tl.maximum(steps, -127.0), 127.0)).to(tl.int8)
            else:
                code = rounding.fp8_code(steps, value, added, KIND, CONVERTS)
            tl.store(out + corner + offsets, code, mask=inside)


def refuses(fmt: Granular, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    """Why this call cannot run here, or None."""
    if isinstance(fmt, Int8) and fmt.rotation:
        return "the codes are of the rotated weight, which no encoder here makes"
    return encoders.refuses(fmt, w, seed, where)


@kernel("quantize", format="fp8_e4m3", backend="triton", refuses=refuses)
@kernel("quantize", format="fp8_e5m2", backend="triton", refuses=refuses)
@kernel("quantize", format="int8", backend="triton", refuses=refuses)
def quantize_granular(fmt: Granular, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, rounded to nearest or, with a seed, stochastically."""
    source, parts, flag = encoders.begin(fmt, w, where)
    n, k = source.shape
    tall, wide = fmt.block_size if fmt.granularity == "block" else (1, k)
    if fmt.granularity == "tensor":
        amax = largest(source, by_row=False)
        parts["scale"] = (amax / divisor(fmt.largest, amax)).clamp_min(MIN_SCALE)
        flag = torch.isfinite(amax).logical_not()
        n, k, tall, wide = 1, n * k, 1, _PIECE
    across, down = triton.cdiv(k, wide), triton.cdiv(n, tall)
    _encode_tiles(
        lambda _: (across * down,),
        source.device, w=source, noise=encoders.noise_for(fmt, source, seed), scales=parts["scale"],
        out=parts["qdata"] if fmt.dtype == torch.int8 else parts["qdata"].view(torch.uint8), flag=flag, n=n, k=k,
        across=across, tall=tall, wide=wide, KIND=_KINDS[fmt.name], LARGEST=float(fmt.largest),
        FIT=fmt.granularity != "tensor", CONVERTS=encoders.converts(source.device), EVEN=k % 16 == 0 and wide % 16 == 0,
        TALL=encoders.power_of_two(min(tall, n)), WIDE=encoders.power_of_two(min(wide, k)),
    )  # fmt: skip
    return encoders.finished(parts, flag, source, where)
