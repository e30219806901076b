"""How fast this machine reads and copies memory: what kernels that are limited by the bus are compared with."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.errors import UnsupportedError


def read_bandwidth(buffer: Tensor) -> int:
    """Read a tensor once, on all threads. Returns the sum of its 64-bit words and last bytes, modulo 2^64."""
    _check(buffer)
    return native.module().read_bandwidth(buffer.data_ptr(), buffer.nbytes, native.threads())


def copy_bandwidth(to: Tensor, source: Tensor) -> None:
    """Copy a tensor's bytes to another of the same size, on all threads. The two must not overlap."""
    _check(to)
    _check(source)
    if to.nbytes != source.nbytes:
        raise UnsupportedError(f"the target has {to.nbytes} bytes and the source {source.nbytes}; give equal sizes")
    native.module().copy_bandwidth(to.data_ptr(), source.data_ptr(), to.nbytes, native.threads())


def _check(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        where = "is not contiguous" if tensor.device.type == "cpu" else f"lies on {tensor.device}"
        raise UnsupportedError(f"the tensor {where}; give a contiguous one on the CPU")
