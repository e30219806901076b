"""CUDA graphs: what happens once, such as loading a kernel or making a constant, must not become part of one."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Within this block kernels may be loaded and memory taken while a CUDA graph is captured, by any thread.

    CUDA otherwise forbids it, as calls that could wait for the GPU, and the capture is lost. They do not wait.
    """
    mode = ctypes.c_int(_RELAXED)
    exchange = None if getattr(torch.version, "hip", None) else _driver().cuThreadExchangeStreamCaptureMode
    if exchange is None:
        yield
        return
    exchange(ctypes.byref(mode))  # which leaves the mode of before there
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def made_apart(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` gives on a device, ready for every stream, made beside whatever this thread does there.

    A tensor that is made while a graph is captured has no values before the graph runs, and one that is made while
    `torch.compile` prepares graphs lies in their memory, where nothing may stay. PyTorch gives a graph what its stream
    and its thread take; so this takes others.
    """

    def run() -> Tensor:
        with torch.cuda.device(device), beside_captures():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                made = make()
            stream.synchronize()
        return made

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _driver() -> ctypes.CDLL:
    """NVIDIA's, which PyTorch has loaded."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
