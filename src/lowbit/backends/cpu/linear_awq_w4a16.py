"""linear for awq_w4a16 in the layout rows16: the codes stay 4 bits until they are multiplied."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import grouped_codes
from lowbit.backends.cpu.operands import refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16, rows16_w4a8

_BITS = 4


def refuses(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return grouped_codes.refuses_group(fmt.group_size, _BITS) or refuses_input(fmt, x, parts, bias)


@kernel("linear", format="awq_w4a16", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=6e-3)
def linear_awq_w4a16(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    return grouped_codes.linear(fmt, x, parts, bias, _BITS, fmt.group_size, grouped_codes.VALUES, int8=False)


# Registered after the one above, which therefore is the one that weights are packed for where nobody asks.
@kernel("linear", format="awq_w4a16", backend="cpu", layout=rows16_w4a8.NAME, refuses=refuses, tolerance=3e-2)
def linear_awq_w4a8(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], which is rounded to int8, parts in rows16_w4a8, bias [N] or None -> [..., N] in the dtype of x."""
    return grouped_codes.linear(fmt, x, parts, bias, _BITS, fmt.group_size, grouped_codes.VALUES, int8=True)
