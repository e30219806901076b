"""What mxfp8 and mxfp4 share: a power of two for every 32 weights along K (OCP Microscaling v1.0), as a byte.

    value = 2 ** (scale - 127)        code 0 is 2 ** -127, a float32 subnormal; 255 would be NaN

Everything here works on the bits of float32 and is exact: no power of two is divided by or found by a logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.floats import e8m0_values
from lowbit.numerics.groups import ceil_div, pad_to

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


def codes_of_steps(step: Tensor) -> Tensor:
    """uint8 codes of powers of two from 2**-127, which is subnormal: no exponent bits are its code, too."""
    return (step.view(torch.int32) >> 23).to(torch.uint8)
