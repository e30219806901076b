"""linear for wna16 of 4 and 8 bits in the layout rows16, with or without zero points."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import grouped_codes
from lowbit.backends.cpu.operands import refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.wna16 import WNA16
from lowbit.layouts import rows16, rows16_w4a8


def refuses(fmt: WNA16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return grouped_codes.refuses_group(_group(fmt, x), fmt.bits) or refuses_input(fmt, x, parts, bias)


def _group(fmt: WNA16, x: Tensor) -> int:
    k = x.shape[-1]
    return min(fmt.group_size or k, k)


def _kind(fmt: WNA16) -> int:
    return grouped_codes.CODES if fmt.zero_point else grouped_codes.NO_ZEROS


@kernel("linear", format="wna16", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=6e-3)
def linear_wna16(fmt: WNA16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    return grouped_codes.linear(fmt, x, parts, bias, fmt.bits, _group(fmt, x), _kind(fmt), int8=False)


# Registered after the one above, which therefore is the one that weights are packed for where nobody asks.
@kernel("linear", format="wna16", backend="cpu", layout=rows16_w4a8.NAME, refuses=refuses, tolerance=3e-2)
def linear_w4a8(fmt: WNA16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], which is rounded to int8, parts in rows16_w4a8, bias [N] or None -> [..., N] in the dtype of x."""
    return grouped_codes.linear(fmt, x, parts, bias, fmt.bits, _group(fmt, x), _kind(fmt), int8=True)
