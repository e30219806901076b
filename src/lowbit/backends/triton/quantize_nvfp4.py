"""quantize for nvfp4 and the op quantize_nvfp4, with the reference's codes and scales, bit for bit.

    scale = e4m3(amax / 6 / global_scale)        code = e2m1(value / (scale * global_scale))

Scales and codes are made in one pass; the global scale of a weight wants another one before it (`largest`). What is
divided by is a scale as it is stored, so its rounding costs nothing that a code can repair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, floats, group_tiles, rounding
from lowbit.backends.triton.largest import largest
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.global_scale import GlobalScale
from lowbit.formats.nvfp4 import GROUP, Nvfp4
from lowbit.formats.parts import Parts

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _over(value, shared, DIVIDES: tl.constexpr):
    return value * shared if DIVIDES else tl.div_rn(value, shared)


@triton.jit
def _times(value, shared, DIVIDES: tl.constexpr):
    return tl.div_rn(value, shared) if DIVIDES else value * shared


@tuned(
    [
        config(ROWS=8, GROUPS=32, warps=4),
        config(ROWS=4, GROUPS=64, warps=4),
        config(ROWS=4, GROUPS=32, warps=4),
    ],
    key=("n_bucket", "k", "x", "ACTIVATION"),
)
@triton.jit(do_not_specialize=("n", "n_bucket"))
def _encode_nvfp4(
    x, noise, shared, qdata, scales, flag, n, n_bucket, k, stride, groups, ACTIVATION: tl.constexpr,
    DIVIDES: tl.constexpr, BY_ROW: tl.constexpr, HIGH_FIRST: tl.constexpr, SWIZZLED: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
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
    factor = tl.load(shared + row, mask=row < n, other=1.0) if BY_ROW else tl.load(shared)
    wanted = _over(tl.div_rn(bits.to(tl.float32, bitcast=True), 6.0), factor, DIVIDES)
    wanted = tl.where(factor == 0.0, 0.0, wanted)
    limited = tl.minimum(tl.maximum(wanted, 0.0), 448.0)
    code = tl.where(wanted == wanted, rounding.float_code(limited, None, rounding.E4M3), 127)  # noqa: PLR0124
    known = (row < n) & (index < groups)
    where = group_tiles.swizzled(row, index, groups) if SWIZZLED else row * groups + index
    tl.store(scales + where, code.to(tl.uint8), mask=known)
    step = _times(floats.e4m3_value(code), factor, DIVIDES)
    alive = step != 0.0
    # With noise a last bit of the quotient counts: the limit is one that is exact, and 6 is cut off behind it.
    limit = 6.0 if noise is None else 8.0
    size = tl.minimum(tl.abs(value), tl.where(alive, limit * step, 0.0))
    divisor = tl.where(alive, step, 1.0)
    steps = rounding.quotient(size, divisor, tl.div_rn(1.0, divisor))
    added = None
    if noise is not None:
        added = tl.load(noise + row * k + column, mask=inside, other=0.0)
        steps = tl.minimum(steps, 6.0)
    sign = rounding.sign_bit(value, 3) & tl.where(alive, 8, 0)
    packed = rounding.nibbles(rounding.float_code(steps, added, rounding.E2M1) | sign, _GROUP, HIGH_FIRST)
    byte = tl.arange(0, _GROUP // 2)[None, None, :]
    tl.store(
        qdata + row * (groups * (_GROUP // 2)) + index * (_GROUP // 2) + byte, packed, mask=known & (byte < _GROUP)
    )


def encode(
    x: Tensor,
    shared: Tensor,
    qdata: Tensor,
    scale: Tensor,
    flag: Tensor | None,
    *,
    noise: Tensor | None = None,
    divides: bool = False,
    activation: str | None = None,
    high_first: bool = False,
    swizzled: bool = False,
) -> None:
    """Write codes and scales of contiguous rows x [n, K], or for swiglu [n, 2 K].

    qdata: uint8 [>= n, 8 * ceil(K / 16)]; scale: as bytes, in natural order or swizzled. shared: float32 [] or [n].
    """
    n, stride = x.shape
    k = stride // 2 if activation == group_tiles.SWIGLU.value else stride
    groups = triton.cdiv(k, GROUP)
    _encode_nvfp4(
        lambda meta: (triton.cdiv(groups, meta["GROUPS"]) * triton.cdiv(n, meta["ROWS"]),),
        x.device, x=x, noise=noise, shared=shared, qdata=qdata, scales=scale, flag=flag, n=n,
        n_bucket=encoders.power_of_two(n), k=k, stride=stride, groups=groups, ACTIVATION=activation, DIVIDES=divides,
        BY_ROW=shared.dim() == 1, HIGH_FIRST=high_first, SWIZZLED=swizzled, EVEN=k % GROUP == 0,
    )  # fmt: skip


@kernel("quantize", format="nvfp4", backend="triton", refuses=encoders.refuses)
def quantize_nvfp4(fmt: Nvfp4, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, rounded to nearest or, with a seed, stochastically."""
    source, parts, flag = encoders.begin(fmt, w, where)
    fitted = GlobalScale(fmt.global_scale_divides, fmt.row_global_scale)
    parts["global_scale"] = fitted.fitted(largest(source, by_row=fmt.row_global_scale))
    encode(
        source, parts["global_scale"], parts["qdata"], parts["scale"].view(torch.uint8), flag,
        noise=encoders.noise_for(fmt, source, seed), divides=fmt.global_scale_divides,
    )  # fmt: skip
    return encoders.finished(parts, flag, source, where)
