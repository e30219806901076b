"""What the processor can do at best, measured: reading and copying memory, and products of large matrices.

The product of two large matrices by PyTorch stands for the peak of the arithmetic units. It is what a good library
reaches in each dtype; where a processor has no instructions for a dtype, that line says so by being low.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.minilm_model import machine
from lowbit import dispatch, memory

READ_MB = 512
_BUFFERS = 6
PEAK_SIZE = 2048
PACKAGES = ("comfy-kitchen", "torchao", "numpy")
_DEFAULT_CACHE = 32 << 20
_RUNS = 5
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt


def about() -> dict[str, Any]:
    """Everything that a result depends on: processor, its features, caches, threads, commit, versions, settings."""
    return {
        **machine(),
        "platform": platform.platform(),
        "features": features(),
        "cache_bytes": cache_bytes(),
        "isa": instruction_set(),
        "threads_of": pool(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "settings": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
        "load": os.getloadavg()[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _matters(name: str) -> bool:
    return name.startswith(("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "LOWBIT_CPU"))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def features() -> list[str]:
    """Those flags of the processor that say which products of matrices it is fast at."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    wanted = ("fma", "f16c", "avx2", "avx512", "avx_vnni", "amx", "asimd", "i8mm", "bf16", "sve")
    return [flag for flag in flags if flag.startswith(wanted)]


def cache_bytes() -> int:
    """The size of the last-level cache."""
    sizes = [_DEFAULT_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes[1:] or sizes)


def instruction_set() -> str | None:
    """Which of its modules the cpu backend uses, or None where that backend is not there."""
    if dispatch.load("cpu") is not None:
        return None
    from lowbit.backends.cpu import native

    return native.isa()


def pool() -> str | None:
    """Whose threads the cpu backend's kernels run on."""
    if dispatch.load("cpu") is not None:
        return None
    from lowbit.backends.cpu import native

    return native.pool()


def readers(megabytes: int = READ_MB) -> dict[str, Callable[[int], object]]:
    """Ways to read a whole buffer of so many MB with all threads, each taking (and ignoring) the number of a copy.

    It lies on huge pages, as weights do, and is the one of some that is read fastest: in a virtual machine the memory
    behind them decides on up to half of their speed.
    """
    made = (memory.empty((megabytes << 18,), torch.float32).fill_(1.0) for _ in range(_BUFFERS))
    buffer = min(list(made), key=lambda one: _least_seconds(one.sum))
    found: dict[str, Callable[[int], object]] = {"torch sum": lambda _: buffer.sum()}
    if dispatch.load("cpu") is None:
        from lowbit.backends.cpu import read_bandwidth

        found["read_bandwidth"] = lambda _: read_bandwidth(buffer)
    return found


def copiers(source: Tensor) -> dict[str, Callable[[int], object]]:
    """Ways to copy a tensor with all threads."""
    target = torch.empty_like(source)
    found: dict[str, Callable[[int], object]] = {"torch copy": lambda _: target.copy_(source)}
    if dispatch.load("cpu") is None:
        from lowbit.backends.cpu import copy_bandwidth

        found["copy_bandwidth"] = lambda _: copy_bandwidth(target, source)
    return found


@contextmanager
def reused_memory(reused: bool) -> Iterator[bool]:
    """Within it, large tensors lie where freed ones lay, or else on pages that are fresh every time.

    Gives whether that is so: only of glibc can it be asked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield False
        return
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1} if reused else {_MMAP_THRESHOLD: 128 << 10}
    usual = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _MMAP_THRESHOLD: 128 << 10}
    done = [mallopt(option, value) for option, value in settings.items()]
    try:
        yield all(done)
    finally:
        for option, value in usual.items():
            mallopt(option, value)


def peaks(size: int = PEAK_SIZE) -> dict[str, float]:
    """GFLOP/s of the best of some products of two matrices [size, size], by dtype."""
    plain = torch.randn(size, size)
    halves = plain.bfloat16()
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    work = 2 * size**3 / 1e9
    return {
        "float32": work / _least_seconds(lambda: plain @ plain),
        "bfloat16": work / _least_seconds(lambda: F.linear(halves, halves)),
        "int8": work / _least_seconds(lambda: torch._int_mm(codes, codes.t())),
    }


def _least_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_RUNS + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
