"""Making GGUF blocks from weights.

Those of `AS_GGML` are made as ggml's reference encoders make them, the same bytes. Of the others the error is less than
with ggml's: K-quants are searched by `gguf_k_encode`, and units of NVFP4 take the best of some scales.

Codes of `AS_GGML` are chosen with the step in float32 and the step is rounded to float16 afterwards; ties go where
ggml's own expressions send them (quantize_row_*_ref in ggml-quants.c). Weights whose step float16 cannot hold saturate,
where ggml writes an infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.floats import E2M1_MAX, E4M3_MAX, divisor, to_fp8
from lowbit.numerics.gguf_blocks import BlockType
from lowbit.numerics.gguf_headers import MAX_HALF, MIN_HALF, half_bytes, nearest_half
from lowbit.numerics.gguf_k_encode import encode_k_blocks
from lowbit.numerics.levels import IntegerLevels

AS_GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "NVFP4")
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4")
_ROUNDS_TO_MAX_HALF = 65519.99609375  # the largest float32 that float16 does not round to infinity
_MIN_POWER, _MAX_POWER = 2.0**-126, 2.0**126  # steps of MXFP4, which are half of its scales
# Which scales of NVFP4 are tried, as e4m3 codes from the nearest one on: zero is not best beside any that is larger.
_SCALES_AROUND = (0, -1, 1, -2, 2, -3, 3, 4, 5)
_LARGEST_E4M3 = 0x7E
# Half of the sums of neighbours among the doubled e2m1 values 0 1 2 3 4 6 8 12; a tie goes to the smaller one.
_BETWEEN = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


def encode_blocks(kind: BlockType, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """float32 [B, columns], finite -> uint8 [B, size] of a type in `WRITABLE`.

    weights: float32, finite and not negative, [B, columns] or what broadcasts to it: how much the squared error of each
    value counts, to the types of `SEARCHED`. None: all the same.
    """
    if kind.shared is not None:
        return encode_k_blocks(kind, x, weights)
    if kind.name == "NVFP4":
        return _encode_nvfp4(kind, x, weights)
    if kind.name == "MXFP4":
        return _encode_mxfp4(kind, x)
    assert isinstance(kind.levels, IntegerLevels)
    low, high = kind.levels.low, kind.levels.high
    if kind.name == "Q8_0":
        step = (x.abs().amax(dim=1, keepdim=True) / divisor(high, x)).clamp_(max=_ROUNDS_TO_MAX_HALF)
        codes = _half_away(x * _inverse(step)).clamp_(low, high).to(torch.int8).view(torch.uint8)
        return kind.join(codes, half_bytes(step))
    if low < 0:  # the largest weight of either sign is at the lowest level
        step = (_largest(x) / divisor(low, x)).clamp_(-_ROUNDS_TO_MAX_HALF, _ROUNDS_TO_MAX_HALF)
        codes = (x * _inverse(step)).add_(kind.offset + 0.5)
        return kind.join(codes.trunc_().clamp_(0, high - low).to(torch.uint8), half_bytes(step))
    least = x.gather(1, x.argmin(dim=1, keepdim=True))  # the first of equals: zeros have signs
    step = ((x.amax(dim=1, keepdim=True) - least).abs_() / divisor(high, x)).clamp_(max=_ROUNDS_TO_MAX_HALF)
    codes = ((x - least) * _inverse(step)).add_(0.5).trunc_().clamp_(0, high).to(torch.uint8)
    least = least.clamp(-_ROUNDS_TO_MAX_HALF, _ROUNDS_TO_MAX_HALF)
    return kind.join(codes, half_bytes(torch.cat([step, least], dim=1)))


def set_steps(kind: BlockType, step: Tensor, zero: Tensor | None) -> Tensor:
    """The headers uint8 [B, header_size] of steps (and zeros) float32 [B, U] that can be stored, each by itself."""
    if kind.name == "MXFP4":
        bits = step.contiguous().view(torch.int32)
        return torch.where(bits < 0x800000, bits >> 22, (bits >> 23) + 1).to(torch.uint8)
    if kind.name == "NVFP4":
        return to_fp8(step.contiguous() * 2.0, torch.float8_e4m3fn).view(torch.uint8)
    return half_bytes(step if zero is None else torch.cat([step, zero], dim=1))


def snap_steps(kind: BlockType, step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The nearest steps (never zero) and zeros that a block of this type can hold."""
    if kind.name == "MXFP4":
        inside = step.clamp(_MIN_POWER, _MAX_POWER)
        below = (inside.view(torch.int32) & 0x7F800000).view(torch.float32)
        return torch.where(inside > 1.5 * below, 2 * below, below).clamp_(max=_MAX_POWER), zero
    sign = torch.where(step < 0, -1.0, 1.0)
    step = step.abs().clamp_(MIN_HALF, MAX_HALF).mul_(sign).to(torch.float16).float()
    return step, None if zero is None else nearest_half(zero)


def _encode_mxfp4(kind: BlockType, x: Tensor) -> Tensor:
    amax = x.abs().amax(dim=1, keepdim=True)
    # ggml takes the logarithm in float32, where a value just below a power of two counts as that power.
    exponent = amax.double().log2().float().floor_().add_(125).clamp_(0, 254)
    header = torch.where(amax > 0, exponent, 0.0).to(torch.uint8)
    inverse = ((254 - header.to(torch.int32)) << 23).view(torch.float32)
    magnitude = (x.abs() * inverse).mul_(2.0)
    codes = torch.bucketize(magnitude, torch.tensor(_BETWEEN, device=x.device)).to(torch.uint8)
    return kind.join(torch.where((x < 0) & (codes > 0), codes + 8, codes), header)


def _encode_nvfp4(kind: BlockType, x: Tensor, weights: Tensor | None) -> Tensor:
    """The best of the scales around the one at which the largest value of a unit is the largest level."""
    units = x.unflatten(1, (-1, kind.unit))
    heavy = None if weights is None else weights.expand_as(x).view_as(units)
    exact = (units.abs().amax(dim=2) / divisor(E2M1_MAX, units)).clamp_(max=E4M3_MAX)
    first = to_fp8(exact, torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    header, least = first.to(torch.uint8), torch.full_like(exact, torch.inf)
    for more in _SCALES_AROUND:
        codes = (first + more).clamp_(0, _LARGEST_E4M3).to(torch.uint8)
        step = kind.steps(codes)[0].unsqueeze(2)
        error = kind.levels.round_(units / step.masked_fill(step == 0, torch.inf)).mul_(step).sub_(units).square_()
        total = (error if heavy is None else error.mul_(heavy)).sum(2)
        better = total < least
        header, least = torch.where(better, codes, header), torch.where(better, total, least)
    step = kind.steps(header)[0].unsqueeze(2)
    return kind.join(kind.nearest(units / step.masked_fill(step == 0, torch.inf)).flatten(1), header)


def _inverse(step: Tensor) -> Tensor:
    """1 / step, and 0 where that is infinite."""
    inverse = step.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def _half_away(x: Tensor) -> Tensor:
    """Rounded to the nearest integer, half away from zero."""
    magnitude = x.abs()
    whole = magnitude.floor()
    return whole.add_(magnitude.sub_(whole).mul_(2.0).floor_()).copysign_(x)


def _largest(x: Tensor) -> Tensor:
    """The value [B, 1] of the largest magnitude in each row, the first of equals."""
    magnitude = x.abs()
    columns = torch.arange(x.shape[1], device=x.device)
    first = torch.where(magnitude == magnitude.amax(dim=1, keepdim=True), columns, x.shape[1]).amin(dim=1, keepdim=True)
    return x.gather(1, first)
