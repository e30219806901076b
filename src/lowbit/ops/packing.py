"""Between plain parts and a kernel's layout: the op `pack` and its inverse `unpack`, dispatched as the products are.

A layout says what the arrangement is (`layouts/`); a backend may have a faster way to make it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowbit.dispatch import select
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


def pack(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """Plain parts in a layout, as its kernels need them. Raises `PartsError` for what it cannot hold."""
    return _moved("pack", fmt, parts, layout)


def unpack(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """The inverse of `pack`, bit for bit. Raises `PartsError` for parts that are not in that layout."""
    return _moved("unpack", fmt, parts, layout)


def _moved(op: str, fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    args = (fmt, parts, layout)
    return select(op, fmt.name, layout, parts["qdata"].device.type, args).run(*args)
