"""A tensor to int8 codes with one scale: the given one, or absmax / 127, which never leaves the GPU.

Some programs leave the largest magnitude of their share, then every program that quantizes takes the largest of those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.quantize_rows import code_of
from lowbit.backends.triton.rounding import magnitude, quotient
from lowbit.backends.triton.spans import span
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.int8_matmul import INT8_MAX, MIN_ACTIVATION_SCALE
from lowbit.numerics.integers import uniform_noise

_LARGEST, _SMALLEST_SCALE = tl.constexpr(float(INT8_MAX)), tl.constexpr(MIN_ACTIVATION_SCALE)
_MOST_SHARES = 512
_SHARE = 16384  # values of a program, where that gives no more than so many


@tuned([config(BLOCK=4096, warps=8, stages=1)])
@triton.jit(do_not_specialize=("size", "shares"))
def _largest_of_shares(x, found, size, shares, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """EVEN: size is a multiple of 16, so that loads need not look at single values."""
    best = tl.zeros((BLOCK,), tl.int32)
    # No loop over 64-bit numbers: not all of Triton's versions have one.
    for step in range(tl.cdiv(size, shares * BLOCK).to(tl.int32)):
        at, inside = span(tl.program_id(0) + shares.to(tl.int64) * step, size, EVEN, BLOCK)
        best = tl.maximum(best, magnitude(tl.load(x + at, mask=inside, other=0.0).to(tl.float32)))
    tl.store(found + tl.program_id(0), tl.max(best, axis=0))


@tuned([config(BLOCK=2048, warps=4, stages=1)])
@triton.jit(do_not_specialize=("size", "shares"))
def _quantize_int8_tensor(
    x, found, noise, codes, scale, size, shares, MOST: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """found: the largest magnitudes of shares, from which the scale is made and stored; None: the scale is given."""
    at, inside = span(tl.program_id(0).to(tl.int64), size, EVEN, BLOCK)
    if found is None:
        factor = tl.load(scale)
        factor = tl.where(factor < _SMALLEST_SCALE, _SMALLEST_SCALE, factor)  # a given 0 would make zeros NaN
    else:
        share = tl.arange(0, MOST)
        bits = tl.max(tl.load(found + share, mask=share < shares, other=0), axis=0)
        factor = tl.div_rn(bits.to(tl.float32, bitcast=True), _LARGEST)
        factor = tl.where(factor < _SMALLEST_SCALE, _SMALLEST_SCALE, factor)  # NaN stays
        if tl.program_id(0) == 0:
            tl.store(scale, factor)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added = None
    if noise is not None:
        added = tl.load(noise + at, mask=inside, other=0.0)
    if found is None:  # a given scale may be anything, so that quotients overflow: only the exact division serves
        steps = tl.div_rn(value, tl.broadcast_to(factor, (BLOCK,)))
    else:
        steps = quotient(value, factor, tl.div_rn(1.0, factor))
    tl.store(codes + at, code_of(steps, added), mask=inside)


def refuses(x: Tensor, scale: Tensor | None, seed: int) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses(x)


@kernel("quantize_int8_tensorwise", backend="triton", refuses=refuses)
def quantize_int8_tensorwise(x: Tensor, scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """x [...] -> codes [...], scale []; the scale is the given one or absmax / 127."""
    values = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    found, shares = None, 0
    if scale is not None:
        one = scale.to(x.device, torch.float32, copy=True).reshape(())
    elif not x.numel():
        one = torch.full((), MIN_ACTIVATION_SCALE, dtype=torch.float32, device=x.device)
    else:
        one = torch.empty((), dtype=torch.float32, device=x.device)
        shares = min(triton.cdiv(x.numel(), _SHARE), _MOST_SHARES)
        found = torch.empty(shares, dtype=torch.int32, device=x.device)
        _largest_of_shares(
            lambda _: (shares,), x.device, x=values, found=found, size=x.numel(), shares=shares,
            EVEN=x.numel() % 16 == 0,
        )  # fmt: skip
    if not x.numel():
        return codes, one
    rows = values.reshape(-1, x.shape[-1]) if x.dim() else values.reshape(1, 1)
    into = codes.view(rows.shape)
    # The noise of some rows is drawn from the number of the first one; without any, all rows are one piece.
    for start, stop in row_chunks(*rows.shape) if seed > 0 else ((0, rows.shape[0]),):
        noise = uniform_noise((stop - start, rows.shape[1]), seed, start, x.device) if seed > 0 else None
        _launch(rows[start:stop], found, noise, into[start:stop], one, shares)
    return codes, one


def _launch(
    x: Tensor, found: Tensor | None, noise: Tensor | None, codes: Tensor, scale: Tensor, shares: int
) -> None:  # fmt: skip
    _quantize_int8_tensor(
        lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),),
        x.device, x=x, found=found, noise=noise, codes=codes, scale=scale, size=x.numel(), shares=shares,
        MOST=_MOST_SHARES, EVEN=x.numel() % 16 == 0,
    )  # fmt: skip
