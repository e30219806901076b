"""Room for large CPU tensors: on huge pages where the system gives them to those who ask, and used again where asked.

A fresh tensor's pages are made when they are first written, each by a trip into the kernel: with pages of 4 KiB that
takes longer than what an encoder or a decoder computes. Reading, too, is faster from huge pages. Linux commonly hands
them out on request only (`madvise` in /sys/kernel/mm/transparent_hugepage/enabled). Elsewhere, and where the request is
refused, these are plain tensors. Only pages that lie in a tensor as a whole are asked for, so it takes no more memory.

Even huge pages are cleared before they are first used. Who makes tensor after tensor and keeps none, as a conversion
does, uses the same memory again and again: `recycling`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = (
    4 << 20
)  # bytes from which on a tensor holds a whole huge page wherever it lies, and a request is worth its time
_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_own = threading.local()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU."""
    pool: _Pool | None = getattr(_own, "pool", None)
    size = math.prod(shape) * dtype.itemsize
    if pool is None or not LEAST <= size <= pool.limit:
        return advise(torch.empty(tuple(shape), dtype=dtype, device="cpu"))
    return torch.frombuffer(pool.lease(size), dtype=dtype).reshape(tuple(shape))


def clone(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor, without gaps."""
    return empty(tensor.shape, tensor.dtype).copy_(tensor)


def advise(tensor: Tensor) -> Tensor:
    """Ask for huge pages for a tensor without gaps that has not been written yet; returns it."""
    size = tensor.nbytes
    if size >= LEAST and tensor.device.type == "cpu" and (request := _request()) is not None:
        page, ask = request
        start, stop = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + size) // page * page
        if start < stop:
            ask(start, stop - start)
    return tensor


@contextmanager
def recycling(limit: int) -> Iterator[None]:
    """Within it, `empty` on this thread gives memory again that tensors have left.

    None lies idle while that and what tensors have are more than `limit` bytes.
    """
    before = getattr(_own, "pool", None)
    _own.pool = _Pool(limit)
    try:
        yield
    finally:
        _own.pool.close()
        _own.pool = before


@functools.cache
def _request() -> tuple[int, Callable[[int, int], object]] | None:
    """The size of a huge page and what asks for them, by address and bytes; None where there are none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    try:
        page = int(_PAGE.read_text(encoding="ascii"))
        madvise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):
        return None
    if advice is None or page <= 0:
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return page, lambda start, size: madvise(start, size, advice)  # what it returns does not matter


class _Pool:
    """Memory that tensors lease; it comes back when the last of a lease's tensors is gone, on whichever thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._leased = 0  # bytes
        self._idle: list[Tensor] = []
        self._lock = threading.RLock()  # a tensor can die, by collection of garbage, wherever memory is allocated

    def lease(self, size: int) -> memoryview:
        """`size` bytes: the smallest idle ones that are enough, or fresh ones and, beyond the limit, fewer idle ones.

        Never of a block more than twice as large: a small tensor that is kept would keep all of it.
        """
        with self._lock:
            fitting = [block for block in self._idle if size <= block.nbytes <= 2 * size]
            block = min(fitting, key=_nbytes) if fitting else None
            if block is not None:
                self._remove(block)
            else:
                self._trim(coming=size)
        if block is None:
            block = advise(torch.empty(size, dtype=torch.uint8, device="cpu"))
        with self._lock:
            self._leased += block.nbytes
        array: Any = block.numpy()  # Any: its stub lacks the buffer protocol
        lease = memoryview(array)[:size]
        weakref.finalize(lease, self._back, block).atexit = False
        return lease

    def _back(self, block: Tensor) -> None:
        with self._lock:
            self._leased -= block.nbytes
            self._idle.append(block)
            self._trim()

    def _trim(self, coming: int = 0) -> None:
        """Let go of the largest idle blocks while more than the limit is held, with `coming` bytes more."""
        while self._idle and self._leased + sum(map(_nbytes, self._idle)) + coming > self.limit:
            self._remove(max(self._idle, key=_nbytes))

    def _remove(self, block: Tensor) -> None:
        self._idle = [other for other in self._idle if other is not block]

    def close(self) -> None:
        """Let go of what is idle, and from now on of what comes back."""
        with self._lock:
            self.limit = 0
            self._idle.clear()


def _nbytes(block: Tensor) -> int:
    return block.nbytes
