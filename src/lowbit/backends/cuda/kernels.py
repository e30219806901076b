"""Launching compiled kernels on torch's current stream.

`launch` compiles a kernel for the device at its first use, keeps it loaded and starts it. Within `record()` launches
are noted instead, so that what is compiled without a GPU is what runs on one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.cuda import compiler
from lowbit.errors import UnsupportedError

# The architectures whose own instructions kernels may use: code for "sm_90a" runs on no other.
_OWN = {(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}


# More dynamic shared memory than this a kernel must be allowed before it starts.
_SHARED_AT_ONCE = 48 * 1024

Argument = Tensor | int | float | None


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded, not run. `shared`: bytes of dynamic shared memory."""

    source: str
    name: str
    shared: int = 0


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
    source: str,
    name: str,
    device: torch.device,
    grid: int | tuple[int, ...],
    block: int,
    arguments: Sequence[Argument],
    shared: int = 0,
) -> None:
    """Start `name` of `source` with blocks of `block` threads and `shared` bytes of dynamic shared memory.

    Tensors go as their addresses, None as null, int as int, float as float. Raises `UnsupportedError` when it cannot be
    compiled.
    """
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(source, name, shared))
        return
    index = device.index  # a tensor's device has one
    core = compiler.core()
    with torch.cuda.device(index):
        kernel = _loaded(source, name, index, shared)
        stream = core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        core.launch(
            stream, core.LaunchConfig(grid=grid, block=block, shmem_size=shared), kernel, *map(_argument, arguments)
        )


def _argument(value: Argument) -> Any:
    """As cuda.core takes it: a plain int is an address."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_float(value)
    return 0 if value is None else ctypes.c_int(value)


@cache
def _loaded(source: str, name: str, index: int, shared: int) -> Any:
    """The kernel on a device. The device's context is torch's: it is current, and was made with its first tensor."""
    core = compiler.core()
    core.Device(index).set_current()
    binary = compiler.compiled(source, name, architecture(torch.cuda.get_device_capability(index)))
    kernel = core.ObjectCode.from_cubin(binary.code).get_kernel(binary.symbol)
    if shared > _SHARED_AT_ONCE:
        _allow_shared(kernel, name, index, shared)
    return kernel


def _allow_shared(kernel: Any, name: str, index: int, shared: int) -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    what = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    handle = kernel.handle if hasattr(kernel, "handle") else kernel._handle  # noqa: SLF001 - as before cuda.core 1.0
    (status,) = driver.cuKernelSetAttribute(what, shared, handle, index)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise UnsupportedError(
            f"the CUDA kernel {name} cannot have {shared} bytes of shared memory on GPU {index}: {status.name}"
        )
