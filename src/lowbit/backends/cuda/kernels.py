"""Launching compiled kernels on torch's current stream.

`launch` compiles a kernel for the device at its first use, keeps it loaded and starts it. Within `record()` launches
are noted instead, so that what is compiled without a GPU is what runs on one.
"""

from __future__ import annotations

import contextlib
import importlib
import struct
import threading
from array import array
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


# More shared memory than 48 KiB a kernel must be allowed before it starts; what it declares itself counts, too.
_SHARED_AT_ONCE = 32 * 1024

_INTS = 1 << 31
_SLOT = 8  # bytes for a parameter of a kernel
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
    registers: int = 0,
) -> None:
    """Start `name` of `source` with blocks of `block` threads and `shared` bytes of dynamic shared memory.

    Tensors go as their addresses, None as null, int as int of 32 bits, float as float. registers: how many a thread
    must have, for a kernel whose warps hand them to each other and would wait for ever for those that are not there.
    Raises `UnsupportedError` when it cannot be compiled, loaded or started.
    """
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(source, name, shared))
        return
    index = device.index  # a tensor's device has one
    x, y, z = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
    slots = array("Q", [_bits(value) for value in arguments])
    first = slots.buffer_info()[0]
    addresses = array("Q", range(first, first + _SLOT * len(slots), _SLOT))
    with torch.cuda.device(index):
        _enter(index)
        function = _loaded(source, name, index, shared, registers).function
        stream = torch.cuda.current_stream().cuda_stream
        (status,) = _driver().cuLaunchKernel(
            function, x, y, z, block, 1, 1, shared, stream, addresses.buffer_info()[0], 0
        )  # fmt: skip
    if status:
        raise _failed(f"starting the CUDA kernel {name}", status)


def _bits(value: Argument) -> int:
    """The eight bytes that begin as the kernel's parameter does."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little")
    if value is None:
        return 0
    if not -_INTS <= value < _INTS:
        raise UnsupportedError(f"{value} is beyond the 32 bits of a kernel's integers; give fewer tokens at a time")
    return value & 0xFFFFFFFF


@dataclass(frozen=True)
class _Loaded:
    """A kernel on a device, and the module that it lives in."""

    module: Any
    function: Any


@cache
def _loaded(source: str, name: str, index: int, shared: int, registers: int) -> _Loaded:
    """The kernel on a device, whose context is torch's."""
    binary = compiler.compiled(source, name, architecture(torch.cuda.get_device_capability(index)))
    with _beside_captures():
        return _load(binary, name, index, shared, registers)


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """Within this block the driver loads what it is given although this or another thread captures a graph.

    It refuses that else, and the graph is lost: in a graph there must be nothing that happens once. Loading happens
    once, and belongs to no graph.
    """
    driver, what = _driver(), "allowing kernels to be loaded while a graph is captured"
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _done(what, driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        _done(what, driver.cuThreadExchangeStreamCaptureMode(before))


def _load(binary: compiler.Binary, name: str, index: int, shared: int, registers: int) -> _Loaded:
    driver, what = _driver(), f"loading the CUDA kernel {name}"
    module = _done(what, driver.cuModuleLoadData(binary.code))
    function = _done(what, driver.cuModuleGetFunction(module, binary.symbol.encode()))
    if shared > _SHARED_AT_ONCE:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        asking = f"giving the CUDA kernel {name} {shared} bytes of shared memory on GPU {index}"
        _done(asking, driver.cuFuncSetAttribute(function, attribute, shared))
    if registers:
        has = _done(what, driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function))
        if has != registers:
            raise UnsupportedError(
                f"the CUDA kernel {name} was compiled to {has} registers a thread and needs {registers}: install the "
                "nvidia-cuda-nvrtc that this version of lowbit was made with, or use_backend('triton')"
            )
    return _Loaded(module, function)


_thread = threading.local()


def _enter(index: int) -> None:
    """Make the device's context current in this thread: torch does so only when it has work of its own there."""
    entered: set[int] = _thread.__dict__.setdefault("entered", set())
    if index not in entered:
        context = _done("taking the GPU's context", _driver().cuDevicePrimaryCtxRetain(index))
        _done("entering the GPU's context", _driver().cuCtxSetCurrent(context))
        entered.add(index)


def _done(what: str, result: tuple[Any, ...]) -> Any:
    """What a call to the driver gave. Raises `UnsupportedError` when it failed."""
    if result[0]:
        raise _failed(what, result[0])
    return result[1] if len(result) > 1 else None


def _failed(what: str, status: Any) -> UnsupportedError:
    return UnsupportedError(f"{what} failed: the driver says {status.name}")


@cache
def _driver() -> Any:
    """The bindings of the driver, without those of the compiler."""
    return importlib.import_module("cuda.bindings.driver")
