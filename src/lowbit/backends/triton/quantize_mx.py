"""quantize for mxfp8 and mxfp4 and the op quantize_mxfp8, with the reference's codes and scales, bit for bit.

Scales are powers of two, found from the bits of the largest magnitude, and divided by exactly, in one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, floats, group_tiles, rounding
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.e8m0_scales import GROUP
from lowbit.formats.parts import Parts

_GROUP = tl.constexpr(GROUP)


@tuned(
    [
        config(ROWS=8, GROUPS=16, warps=4),
        config(ROWS=4, GROUPS=32, warps=4),
        config(ROWS=4, GROUPS=16, warps=4),
    ],
    key=("n_bucket", "k", "x", "FOUR_BITS", "ACTIVATION"),
)
@triton.jit(do_not_specialize=("n", "n_bucket"))
def _encode_mx(
    x, noise, qdata, scales, flag, n, n_bucket, k, stride, groups, ACTIVATION: tl.constexpr, FOUR_BITS: tl.constexpr,
    CONVERTS: tl.constexpr, SWIZZLED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of GROUPS groups a program. stride: from row to row of x, which with swiglu holds gate and up."""
    across = tl.cdiv(groups, GROUPS)
    row, index, column, inside = group_tiles.place(n, k, _GROUP, across, EVEN, ROWS, GROUPS, _GROUP)
    at = x + row * stride + column
    value = group_tiles.load(at, at + k, inside, ACTIVATION)
    bits = tl.max(rounding.magnitude(value), axis=2, keep_dims=True)
    if flag is not None:
        worst = tl.max(tl.max(tl.reshape(bits, (ROWS, GROUPS)), axis=1), axis=0)
        tl.store(flag, 1, mask=worst >= rounding.INFINITY)
    code = rounding.e8m0_code(bits, 2 if FOUR_BITS else 8)
    known = (row < n) & (index < groups)
    where = group_tiles.swizzled(row, index, groups) if SWIZZLED else row * groups + index
    tl.store(scales + where, code.to(tl.uint8), mask=known)
    scaled = value * floats.e8m0_value(254 - code)
    scaled = scaled + tl.where(code == 0, 0.0, -0.0)  # under the lowest scale zeros lose their sign
    added = None
    if noise is not None:
        added = tl.load(noise + row * k + column, mask=inside, other=0.0)
    if FOUR_BITS:
        size = tl.minimum(tl.abs(scaled), 6.0)
        codes = rounding.float_code(size, added, rounding.E2M1) | rounding.sign_bit(scaled, 3)
        packed = rounding.nibbles(codes, _GROUP, False)
        byte = tl.arange(0, _GROUP // 2)[None, None, :]
        at = qdata + row * (groups * (_GROUP // 2)) + index * (_GROUP // 2) + byte
        tl.store(at, packed, mask=known & (byte < _GROUP // 2))
    else:
        size = tl.minimum(tl.abs(scaled), 448.0, propagate_nan=tl.PropagateNan.ALL)
        inner = tl.arange(0, _GROUP)[None, None, :]
        at = qdata + row * (groups * _GROUP) + index * _GROUP + inner
        codes = rounding.fp8_code(size, scaled, added, rounding.E4M3, CONVERTS)
        tl.store(at, codes, mask=known & (inner < _GROUP))


def encode(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    flag: Tensor | None,
    *,
    four_bits: bool = False,
    noise: Tensor | None = None,
    activation: str | None = None,
    swizzled: bool = False,
) -> None:
    """Write codes and scales of contiguous rows x [n, K], or for swiglu [n, 2 K].

    qdata: as bytes, [>= n, K' or K' / 2], K' = 32 * ceil(K / 32); scale: as bytes, in natural order or swizzled.
    """
    n, stride = x.shape
    k = stride // 2 if activation == group_tiles.SWIGLU.value else stride
    groups = triton.cdiv(k, GROUP)
    _encode_mx(
        lambda meta: (triton.cdiv(groups, meta["GROUPS"]) * triton.cdiv(n, meta["ROWS"]),),
        x.device, x=x, noise=noise, qdata=qdata, scales=scale, flag=flag, n=n, n_bucket=encoders.power_of_two(n), k=k,
        stride=stride, groups=groups, ACTIVATION=activation, FOUR_BITS=four_bits,
        CONVERTS=encoders.converts(x.device), SWIZZLED=swizzled, EVEN=k % GROUP == 0,
    )  # fmt: skip


@kernel("quantize", format="mxfp8", backend="triton", refuses=encoders.refuses)
@kernel("quantize", format="mxfp4", backend="triton", refuses=encoders.refuses)
def quantize_mx(fmt: Format, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, rounded to nearest or, with a seed, stochastically."""
    source, parts, flag = encoders.begin(fmt, w, where)
    encode(
        source, parts["qdata"].view(torch.uint8), parts["scale"], flag, four_bits=fmt.name == "mxfp4",
        noise=encoders.noise_for(fmt, source, seed),
    )  # fmt: skip
    return encoders.finished(parts, flag, source, where)
