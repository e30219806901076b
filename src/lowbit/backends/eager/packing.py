"""pack and unpack for every layout: as the layout itself says."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts.base import get_layout


@kernel("pack", backend="eager", layout=ANY_LAYOUT)
def pack(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """Plain parts -> packed parts."""
    return get_layout(layout, fmt).packed(fmt, parts)


@kernel("unpack", backend="eager", layout=ANY_LAYOUT)
def unpack(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """Packed parts -> plain parts."""
    return get_layout(layout, fmt).unpack(fmt, parts)
