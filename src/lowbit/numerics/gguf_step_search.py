"""Steps of least squared error for the types of GGUF blocks that `gguf_encode` makes as ggml does: Q4_0 to Q8_0, MXFP4.

Each block starts as ggml's reference encoder makes it and changes only where its error becomes smaller, each column
counting by its weight. With no weights Gaussian blocks gain 0.3 (MXFP4) to 1 dB (Q4_1, Q5_1), with an importance
matrix over three decades 1 to 3 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.gguf_blocks import BlockType
from lowbit.numerics.gguf_headers import nearest_half
from lowbit.numerics.gguf_units import Units, inverse, search_steps, search_steps_and_zeros
from lowbit.numerics.levels import IntegerLevels

# At what level to put the largest value, as what is added to the lowest or, of levels from 0 up, to the highest one.
TRIES = {
    "Q4_0": (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
    "Q5_0": (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    "Q8_0": (0.0, -0.5, 0.5, 1.0),
    "Q4_1": (-0.6, 0.3, 1.2, 2.1, 3.0),
    "Q5_1": (-0.6, 0.5, 1.7, 2.8, 4.0),
}
PASSES = 2  # of rounding and fitting in turn
_POWERS = (-1, 1)  # of the scale of MXFP4, beside that of ggml
_LARGEST_POWER = 254
_LEAST_WEIGHT = 1e-6  # of the largest of a block: what counts nothing is still not to become anything
_CACHED, _AT_ONCE = 1 << 16, 1 << 20  # values worked on at once: on a CPU what stays in its second cache


def search_blocks(kind: BlockType, x: Tensor, weights: Tensor | None, start: Tensor) -> Tensor:
    """The blocks uint8 [B, size] of float32 x [B, columns], finite, with the least error; `start`: those of ggml.

    weights: float32, finite and not negative, of the shape of x: how much the squared error of each value counts.
    None: all the same.
    """
    out = torch.empty_like(start)
    count = (_CACHED if x.device.type == "cpu" else _AT_ONCE) // kind.columns
    for first in range(0, x.shape[0], count):
        piece = slice(first, first + count)
        out[piece] = _searched(kind, x[piece], None if weights is None else weights[piece], start[piece])
    return out


def _searched(kind: BlockType, x: Tensor, weights: Tensor | None, start: Tensor) -> Tensor:
    if weights is not None:
        weights = (weights * inverse(weights.amax(dim=1, keepdim=True))).clamp_min_(_LEAST_WEIGHT).t().contiguous()
    header = kind.headers(start)
    units = Units(x.t().contiguous(), weights, kind.levels)
    least = _errors(kind, units, header)
    for other in _other_headers(kind, units, header):
        error = _errors(kind, units, other)
        better = error < least
        header, least = torch.where(better.unsqueeze(1), other, header), torch.where(better, error, least)
    step, zero = kind.steps(header)
    values = x if zero is None else x - zero
    codes = kind.nearest(values / step.masked_fill(step == 0, torch.inf))
    same = (header == kind.headers(start)).all(dim=1, keepdim=True)
    return torch.where(same, start, kind.join(codes, header))


def _errors(kind: BlockType, units: Units, header: Tensor) -> Tensor:
    """The weighted squared error [B] under headers [B, h]."""
    step, zero = kind.steps(header)
    return units.errors(step.squeeze(1), None if zero is None else zero.squeeze(1))


def _other_headers(kind: BlockType, units: Units, header: Tensor) -> list[Tensor]:
    if not isinstance(kind.levels, IntegerLevels):
        return [(header.to(torch.int16) + more).clamp_(0, _LARGEST_POWER).to(torch.uint8) for more in _POWERS]
    if kind.levels.low < 0:
        step = search_steps(units, TRIES[kind.name], PASSES, both_signs=kind.levels.low != -kind.levels.high)
        return [_halves(step)]
    step, zero = search_steps_and_zeros(units, TRIES[kind.name], PASSES, any_zero=True)
    return [_halves(step, zero)]


def _halves(*values: Tensor) -> Tensor:
    """The header of steps (and zeros) [B] in float16: uint8 [B, 2] or [B, 4]."""
    return nearest_half(torch.stack(values, dim=1)).to(torch.float16).view(torch.uint8)
