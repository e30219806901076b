"""4-bit activations times 4-bit weights in groups of 64 along K: the arithmetic of SVDQuant (arXiv 2411.05007).

    y[m, n] = sum over groups g of  a_scale[m, g] * b_scale[n, g] * sum over k in g of a[m, k] * b[n, k]

The inner sums are exact: a product is at most 15 * 8 and 64 of them stay far below 2**24, up to which float32 holds
every integer. Everything else is float32 too. Never float16: scales of real checkpoints reach 28, and such products
overflow it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import group_amax, row_chunks
from lowbit.numerics.integers import round_clamp_
from lowbit.numerics.packing import sign_extend_nibbles, unpack_nibbles

GROUP = 64
SIGNED_MAX = 7  # activations and round-to-nearest weights use [-7, 7]
UNSIGNED_MAX = 15
GELU_SHIFT = (
    0.171875  # just above 0.170, the depth of GELU's only dip: what comes after a GELU plus this is not negative
)
_MIN_AMAX = 1e-10
_PIECE = 1 << 22  # elements of any float32 temporary: 16 MiB


def smoothed(x: Tensor, smooth: Tensor) -> Tensor:
    """x / smooth in float32, over the last axis. A channel whose factor is 0 is switched off: it gives 0."""
    factor = smooth.float()
    return x.float() / factor.masked_fill(factor == 0, torch.inf)


def quantize_groups(x: Tensor, smooth: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] / smooth [K] by groups of 64 -> codes [M, K] (int8 values) and float32 scales [M, K/64].

    Signed: scale = absmax / 7, codes in [-7, 7]. Unsigned: scale = absmax / 15, codes in [0, 15]; the caller has
    shifted x. absmax is at least 1e-10. Codes are round_half_even(value / scale), clamped.
    """
    limit = UNSIGNED_MAX if unsigned else SIGNED_MAX
    value = smoothed(x, smooth)
    scale = group_amax(value, GROUP).clamp_min_(_MIN_AMAX).div_(divisor(limit, value))
    groups = value.unflatten(1, (scale.shape[1], GROUP)).div_(scale.unsqueeze(-1))
    return round_clamp_(groups, 0 if unsigned else -limit, limit).to(torch.int8).flatten(1), scale


def rounded_input(x: Tensor, smooth: Tensor, unsigned: bool) -> Tensor:
    """x [M, K] / smooth [K] as quantization leaves it, float32; unsigned, the shift is added and taken off."""
    shift = GELU_SHIFT if unsigned else 0.0
    codes, scale = quantize_groups(x + shift, smooth, unsigned)
    groups = codes.unflatten(1, (scale.shape[1], GROUP)) * scale.unsqueeze(-1)
    return groups.flatten(1).sub_(smoothed(torch.full_like(smooth, shift), smooth))


def round_groups(rows: Tensor) -> Tensor:
    """float32 [n, K] -> what signed rounding to nearest by groups of 64 makes of it, absmax / 7."""
    scale = group_amax(rows, GROUP).clamp_min_(_MIN_AMAX).div_(divisor(SIGNED_MAX, rows)).unsqueeze(-1)
    groups = rows.unflatten(1, (rows.shape[1] // GROUP, GROUP)) * scale.reciprocal()
    return groups.round_().mul_(scale).flatten(1)


def unpack_codes(packed: Tensor, unsigned: bool) -> Tensor:
    """Bytes [..., P], even column in the low nibble -> int8 values [..., 2 P] in [0, 15] or [-8, 7]."""
    codes = unpack_nibbles(packed)
    return codes.view(torch.int8) if unsigned else sign_extend_nibbles(codes)


def grouped_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The sum above: codes a [M, K], b [N, K] and float32 scales [M, K/64], [N, K/64] -> float32 [M, N].

    Groups are summed from left to right, as many at a time as a bounded temporary holds.
    """
    m, n, groups = a.shape[0], b.shape[0], a_scale.shape[1]
    total = torch.zeros((m, n), dtype=torch.float32, device=a.device)
    if not m or not n:
        return total
    left = a.float().view(m, groups, GROUP).transpose(0, 1)  # [G, M, 64]
    right = b.float().view(n, groups, GROUP).permute(1, 2, 0)  # [G, 64, N]
    at_once = max(1, _PIECE // (m * n))
    for first in range(0, groups, at_once):
        some = slice(first, min(first + at_once, groups))
        products = torch.bmm(left[some], right[some])
        products.mul_(a_scale.t()[some].unsqueeze(2)).mul_(b_scale.t()[some].unsqueeze(1))
        for product in products:  # one order of summation, however the groups are cut
            total += product
    return total


def weight_pieces(n: int, a: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of the N rows of a weight to multiply with a [M, K] at a time: bounded, and multiples of 128 rows."""
    return row_chunks(n, max(a.shape), 128, _PIECE)


def grouped_linear_(
    out: Tensor,
    a: Tensor,
    a_scale: Tensor,
    low: Tensor,
    packed: Tensor,
    b_scale: Tensor,
    up: Tensor,
    bias: Tensor | None,
) -> None:
    """Write `grouped_product + low @ up.T + bias` into out [M, N] of any float dtype; one cast, at the end.

    a: codes [M, K] with float32 scales a_scale [M, K/64]. low: [M, R]. packed: signed bytes [N, K/2] with scales
    b_scale [K/64, N]. up: [N, R]. bias: [N]. Works on the pieces of the weight that `weight_pieces` gives.
    """
    for start, stop in weight_pieces(packed.shape[0], a):
        codes = unpack_codes(packed[start:stop], unsigned=False)
        total = grouped_product(a, a_scale, codes, b_scale[:, start:stop].t().float())
        total.addmm_(low.float(), up[start:stop].float().t())
        out[:, start:stop] = total if bias is None else total.add_(bias[start:stop].float())
