"""What the headers of GGUF blocks say of steps and zeros: read as ggml reads them, and written.

The K-quants have scales on two levels: a unit's step is a whole number times one float16 of its block, and so is its
zero (`Shared`). (ggml states the layouts in ggml-common.h and the arithmetic in dequantize_row_* of ggml-quants.c.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor

Steps = tuple[Tensor, "Tensor | None"]
MAX_HALF = 65504.0
MIN_HALF = 2.0**-24


def halves(raw: Tensor) -> Tensor:
    """uint8 [B, 2 n] -> float32 [B, n]: little-endian float16."""
    pairs = raw.reshape(raw.shape[0], raw.shape[1] // 2, 2).to(torch.int16)
    return (pairs[..., 0] | (pairs[..., 1] << 8)).view(torch.float16).float()


def half_bytes(values: Tensor) -> Tensor:
    """float32 [B, n] -> uint8 [B, 2 n]: the inverse of `halves`, rounding to nearest."""
    bits = values.to(torch.float16).contiguous().view(torch.int16)
    return torch.stack([bits & 0xFF, (bits >> 8) & 0xFF], dim=-1).to(torch.uint8).flatten(1)


def nearest_half(x: Tensor) -> Tensor:
    """The nearest finite float16 of float32 values, as float32."""
    return x.clamp(-MAX_HALF, MAX_HALF).to(torch.float16).float()


# ---- one step a unit ------------------------------------------------------------------------------------------------


def one_half(header: Tensor) -> Steps:
    """A step for the block."""
    return halves(header), None


def two_halves(header: Tensor) -> Steps:
    """A step and a zero for the block."""
    both = halves(header)
    return both[:, :1], both[:, 1:]


def power(header: Tensor) -> Steps:
    """2 ** (e - 128) for the byte e; the two smallest are subnormal."""
    wide = header.to(torch.int32)
    bits = torch.where(wide < 2, 0x200000 << wide.clamp_max(1), (wide - 1) << 23)
    return bits.to(torch.int32).view(torch.float32), None


def unsigned_e4m3(header: Tensor) -> Steps:
    """Half of an e4m3 value whose sign bit does not count; 0x7f is zero."""
    exponent, mantissa = ((header >> 3) & 0xF).to(torch.int32), (header & 7).float()
    whole = ((exponent - 8 + 127) << 23).view(torch.float32)
    value = torch.where(exponent == 0, mantissa * 2.0**-10, (1.0 + mantissa / 8.0) * whole)
    return value.masked_fill_(header == 0x7F, 0.0), None


# ---- steps on two levels --------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """The header of B blocks of U units, float32.

    factor [B, 1] times scales [B, U] are the steps, zero_factor [B, 1] times minima [B, U] the zeros, negated; None
    where a type has no zeros. Scales and minima are whole numbers.
    """

    factor: Tensor
    scales: Tensor
    zero_factor: Tensor | None = None
    minima: Tensor | None = None

    @property
    def steps(self) -> Steps:
        """Steps and zeros [B, U]."""
        if self.zero_factor is None or self.minima is None:
            return self.factor * self.scales, None
        return self.factor * self.scales, (self.zero_factor * self.minima).neg_()

    def with_steps(self, step: Tensor, zero: Tensor | None, holding: Split) -> Split:
        """With other steps and zeros [B, U], multiples of the float16 of `holding`: taken where there are any."""
        factor = torch.where((step != 0).any(dim=1, keepdim=True), holding.factor, self.factor)
        changed = self._replace(factor=factor, scales=_multiples(step, factor))
        if zero is None or self.zero_factor is None or holding.zero_factor is None:
            return changed
        zero_factor = torch.where((zero != 0).any(dim=1, keepdim=True), holding.zero_factor, self.zero_factor)
        return changed._replace(zero_factor=zero_factor, minima=_multiples(-zero, zero_factor))

    def holding(self, step: Tensor, zero: Tensor | None, high: int) -> Split:
        """The same, but float16 for the largest of steps and zeros [B, U] as multiples of `high` for those of 0.

        A step gets the smallest float16 at least; a zero where the block has no steps either.
        """
        unused = self.factor == 0
        factor = nearest_half(step.amax(1, keepdim=True) / divisor(high, step)).clamp_min_(MIN_HALF)
        found = self._replace(factor=torch.where(unused, factor, self.factor))
        if zero is None or self.zero_factor is None:
            return found
        zero_factor = nearest_half(-zero.amin(1, keepdim=True) / divisor(high, zero))
        return found._replace(zero_factor=torch.where(unused & (self.zero_factor == 0), zero_factor, self.zero_factor))


@dataclass(frozen=True)
class Shared:
    """How a type packs its `Split`. Scales are from `low` to `high`, minima from 0 to `high`."""

    low: int
    high: int
    split: Callable[[Tensor], Split]
    join: Callable[[Split], Tensor]
    """The inverse of `split`: uint8 [B, header_size]."""

    def steps(self, header: Tensor) -> Steps:
        """Steps and zeros [B, U] of headers uint8 [B, header_size]."""
        return self.split(header).steps


def _multiples(x: Tensor, factor: Tensor) -> Tensor:
    return (x / factor.masked_fill(factor == 0, torch.inf)).round_()


def _factors(found: Split) -> Tensor:
    """The bytes of the two float16."""
    assert found.zero_factor is not None
    return half_bytes(torch.cat([found.factor, found.zero_factor], dim=1))


def _integers(found: Split) -> tuple[Tensor, Tensor]:
    """Scales and minima as bytes."""
    assert found.minima is not None
    return found.scales.to(torch.uint8), found.minima.to(torch.uint8)


def _split_four_bits(header: Tensor) -> Split:
    """Sixteen bytes, a scale in the low nibble and a minimum in the high one, then the float16."""
    both, whole = header[:, :16], halves(header[:, 16:])
    return Split(whole[:, :1], (both & 0xF).float(), whole[:, 1:], (both >> 4).float())


def _join_four_bits(found: Split) -> Tensor:
    scale, least = _integers(found)
    return torch.cat([scale | (least << 4), _factors(found)], dim=1)


def _split_six_bits(header: Tensor) -> Split:
    """The float16; four scales, four minima; what four bytes hold of the other four: the rest is above the first."""
    whole = halves(header[:, :4])
    scale, least, upper = header[:, 4:].split(4, dim=1)
    scales = torch.cat([scale & 0x3F, (upper & 0x0F) | ((scale >> 2) & 0x30)], dim=1)
    minima = torch.cat([least & 0x3F, (upper >> 4) | ((least >> 2) & 0x30)], dim=1)
    return Split(whole[:, :1], scales.float(), whole[:, 1:], minima.float())


def _join_six_bits(found: Split) -> Tensor:
    scale, least = _integers(found)
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = least[:, :4] | ((least[:, 4:] >> 4) << 6)
    upper = (scale[:, 4:] & 0x0F) | ((least[:, 4:] & 0x0F) << 4)
    return torch.cat([_factors(found), first, second, upper], dim=1)


def _split_signed_six_bits(header: Tensor) -> Split:
    """Nibbles of eight bytes, the upper two bits of sixteen scales in four, then the float16. 32 means 0."""
    nibbles, upper = header[:, :8], header[:, 8:12]
    low = torch.cat([nibbles & 0x0F, nibbles >> 4], dim=1)
    high = torch.cat([(upper >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    return Split(halves(header[:, 12:]), (low | (high << 4)).float().sub_(32.0))


def _join_signed_six_bits(found: Split) -> Tensor:
    codes = (found.scales + 32.0).to(torch.uint8)
    nibbles = (codes[:, :8] & 0x0F) | ((codes[:, 8:] & 0x0F) << 4)
    upper = [piece << (2 * i) for i, piece in enumerate((codes >> 4).split(4, dim=1))]
    return torch.cat([nibbles, upper[0] | upper[1] | upper[2] | upper[3], half_bytes(found.factor)], dim=1)


def _split_signed_bytes(header: Tensor) -> Split:
    """Sixteen bytes of two's complement, then the float16."""
    return Split(halves(header[:, 16:]), header[:, :16].contiguous().view(torch.int8).float())


def _join_signed_bytes(found: Split) -> Tensor:
    return torch.cat([found.scales.to(torch.int8).view(torch.uint8), half_bytes(found.factor)], dim=1)


FOUR_BITS = Shared(0, 15, _split_four_bits, _join_four_bits)
SIX_BITS = Shared(0, 63, _split_six_bits, _join_six_bits)
SIGNED_SIX_BITS = Shared(-32, 31, _split_signed_six_bits, _join_signed_six_bits)
SIGNED_BYTES = Shared(-128, 127, _split_signed_bytes, _join_signed_bytes)
