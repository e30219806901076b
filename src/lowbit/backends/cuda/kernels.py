"""Launching compiled kernels on torch's current stream.

`launch` compiles a kernel for the device at its first use, keeps it loaded and starts it. Within `record()` launches
are noted instead, so that what is compiled without a GPU is what runs on one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.cuda import compiler

# The architectures whose own instructions kernels may use: code for "sm_90a" runs on no other.
_OWN = {(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded, not run."""

    source: str
    name: str


_recorded: ContextVar[list[Launch] | None] = ContextVar("lowbit_cuda_launches", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within this block launches are noted instead of run."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def architecture(capability: tuple[int, int]) -> str:
    """The name by which the compiler knows a compute capability."""
    return f"sm_{capability[0]}{capability[1]}{'a' if capability in _OWN else ''}"


def launch(
    source: str, name: str, device: torch.device, grid: int, block: int, arguments: Sequence[Tensor | int | None]
) -> None:
    """Start `name` of `source` with blocks of `block` threads. Tensors go as their addresses, None as null, int as int.

    Raises `UnsupportedError` when it cannot be compiled.
    """
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(source, name))
        return
    index = device.index  # a tensor's device has one
    core = compiler.core()
    with torch.cuda.device(index):
        kernel = _loaded(source, name, index)
        stream = core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        core.launch(stream, core.LaunchConfig(grid=grid, block=block), kernel, *map(_argument, arguments))


def _argument(value: Tensor | int | None) -> Any:
    """As cuda.core takes it: a plain int is an address."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return 0 if value is None else ctypes.c_int(value)


@cache
def _loaded(source: str, name: str, index: int) -> Any:
    """The kernel on a device. The device's context is torch's: it is current, and was made with its first tensor."""
    core = compiler.core()
    core.Device(index).set_current()
    binary = compiler.compiled(source, name, architecture(torch.cuda.get_device_capability(index)))
    return core.ObjectCode.from_cubin(binary.code).get_kernel(binary.symbol)
