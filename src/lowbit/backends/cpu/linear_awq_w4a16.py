"""linear for awq_w4a16 in the layout rows16: the codes stay 4 bits until they are multiplied."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import grouped_codes
from lowbit.backends.cpu.operands import refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

_BITS = 4


def refuses(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return grouped_codes.refuses_group(fmt.group_size, _BITS) or refuses_input(fmt, x, parts, bias)


@kernel("linear", format="awq_w4a16", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=6e-3)
def linear_awq_w4a16(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    n, zeros = rows16.rows(fmt, parts), parts["zero"]
    return grouped_codes.linear(
        x, n, parts["qdata"], _BITS, parts["scale"], zeros, grouped_codes.VALUES, fmt.group_size, bias
    )
