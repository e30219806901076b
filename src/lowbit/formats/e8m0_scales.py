"""What mxfp8 and mxfp4 share: a power of two for every 32 weights along K (OCP Microscaling v1.0), as a byte.

    value = 2 ** (scale - 127)        code 0 is 2 ** -127, a float32 subnormal; 255 would be NaN

Every scale is found and applied by the bits of float32, exactly: no power of two is divided by or found by a logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.formats.base import Candidate
from lowbit.formats.parts import Parts
from lowbit.numerics.floats import e8m0_values
from lowbit.numerics.groups import ceil_div, group_amax, pad_to

GROUP = 32


def codes_for(amax: Tensor, exponent: int) -> Tensor:
    """int32 codes of the smallest 2**e >= amax / (1.75 * 2**exponent), from 2**-127 (code 0); amax is finite, >= 0.

    A mantissa above 1.75 (0x600000) carries into the exponent; no quotient is formed, so none is rounded.
    """
    carried = amax.view(torch.int32) + (0x7FFFFF - 0x600000)
    return (carried >> 23).sub_(exponent).clamp_(0, 254)


def scale_down(rows: Tensor, scale: Tensor) -> Tensor:
    """Rows divided by their powers of two, by groups: [n, G, 32]. Multiplies by the inverse, which is exact."""
    groups = ceil_div(rows.shape[1], GROUP)
    padded = pad_to(rows, rows.shape[0], groups * GROUP).unflatten(1, (groups, GROUP))
    return padded * e8m0_values(254 - scale).unsqueeze(-1)


def scale_up(values: Tensor, scale: Tensor) -> Tensor:
    """Values [n, G, 32] or [n, 32 G] times their powers of two -> [n, 32 G]. Writes over `values`."""
    groups = values.view(*scale.shape, GROUP)
    return groups.mul_(e8m0_values(scale).unsqueeze(-1)).flatten(1)


def fitted_and_half(rows: Tensor, params: Parts, exponent: int, largest: float) -> Iterator[Candidate]:
    """The scale of `codes_for` in each group of rows, unless all have it, and half of it. See `Format.candidates`.

    `largest`: the largest value of a code. Half of the scale clips what is above it.
    """
    amax = group_amax(rows, GROUP)
    first = codes_for(amax, exponent)
    start = params["scale"].to(torch.int32)
    if not torch.equal(start, first):
        yield Candidate({"scale": first.to(torch.uint8)})
    half = (first - 1).clamp_min_(0).to(torch.uint8)
    bound = (amax - e8m0_values(half) * largest).clamp_min_(0.0).square_()
    yield Candidate({"scale": half}, bound.masked_fill_((first == 0) | (start == first - 1), float("inf")))


def codes_of_steps(step: Tensor) -> Tensor:
    """uint8 codes of powers of two from 2**-127, which is subnormal: no exponent bits are its code, too."""
    return (step.view(torch.int32) >> 23).to(torch.uint8)
