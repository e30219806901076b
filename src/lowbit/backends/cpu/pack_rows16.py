"""pack and unpack for the layout rows16: the codes moved natively, a cache line of each row at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16, rows16_w4a8


@kernel("pack", backend="cpu", layout=rows16.NAME)
def pack_rows16(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """Plain parts -> rows16."""
    return rows16.pack(fmt, parts, _interleave)


@kernel("pack", backend="cpu", layout=rows16_w4a8.NAME)
def pack_rows16_w4a8(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """Plain parts -> rows16_w4a8."""
    return rows16_w4a8.pack(fmt, parts, _interleave)


@kernel("unpack", backend="cpu", layout=rows16.NAME)
@kernel("unpack", backend="cpu", layout=rows16_w4a8.NAME)
def unpack_rows16(fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
    """The inverse of pack_rows16."""
    return rows16.unpack(fmt, parts, _separate)


def _interleave(codes: Tensor, unit: int) -> Tensor:
    codes = codes.contiguous()
    n, size = codes.shape
    made = memory.empty(rows16.packed_shape(n, size), torch.int32)
    to, stride = made.data_ptr(), made.shape[1]
    native.module().interleave_rows16(codes.data_ptr(), n, size, unit, to, stride, threads())
    return made


def _separate(packed: Tensor, n: int, unit: int) -> Tensor:
    size = packed.shape[1] // rows16.ROWS * rows16.WORD
    made = memory.empty((n, size), torch.uint8)
    source, stride = packed.contiguous(), packed.shape[1]
    native.module().separate_rows16(source.data_ptr(), n, size, unit, made.data_ptr(), stride, threads())
    return made


def threads() -> int:
    """One where several weights are packed at a time, each by a thread of its own."""
    return native.threads() if threading.current_thread() is threading.main_thread() else 1
