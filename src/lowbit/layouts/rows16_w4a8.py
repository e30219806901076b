"""rows16_w4a8: the arrangement of rows16, by which a user asks for products with activations in int8. Version 1.

The parts lie as in rows16, and mean the same weight. But where rows16 is multiplied with activations as they are, the
kernels of this layout round them to int8 first, by blocks of at most 32 columns with a scale each (`numerics.w4a8`),
whatever their dtype. That costs about 0.5 % of the result's RMS, 2 % where one activation in 64 is thirty times larger
than the others, and is the fastest way for 4-bit weights. It is never chosen by "auto", only by name:
`lowbit.load(.., layout="rows16_w4a8")`, or `lowbit.nn.repack_(module, "rows16_w4a8")`. A kernel that takes plain parts
alone unpacks them and leaves activations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16
from lowbit.layouts.base import Layout, register_layout

NAME = "rows16_w4a8"
VERSION = 1
FORMATS = ("awq_w4a16", "wna16")
_BITS = 4


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] cannot be arranged like this, in words that follow its shape, or None."""
    return _refuses_bits(fmt) or rows16.refuses(fmt, n, k)


def pack(
    fmt: Format, parts: Mapping[str, Tensor], interleaver: Callable[[Tensor, int], Tensor] = rows16.interleave
) -> Parts:
    """Plain parts -> this arrangement. Raises `PartsError` for what it cannot hold."""
    if why := _refuses_bits(fmt):
        raise PartsError(f"a weight that {why} cannot be stored in {NAME}; rows16 holds it")
    return rows16.pack(fmt, parts, interleaver)


def _refuses_bits(fmt: Format) -> str | None:
    bits = fmt.config().get("bits", _BITS)
    return f"has codes of {bits} bits, not of {_BITS}" if bits != _BITS else None


register_layout(
    Layout(
        NAME, VERSION, FORMATS, pack, rows16.unpack, refuses, stored=False, rows=rows16.rows,
        shapes=rows16.shapes, alignment=4,
    )
)  # fmt: skip
