"""What the GPU can do at best, measured: copying memory, and products of large matrices by PyTorch in each dtype."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu_timing import event_seconds

COPY_BYTES = 1 << 30
PEAK_SIZE = 8192
PACKAGES = ("torch", "triton", "numpy", "gemlite", "torchao", "comfy-kitchen", "bitsandbytes")
_RUNS = 7
_DRIVER = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"


def about() -> dict[str, Any]:
    """Everything that a result depends on: GPU, driver, versions, commit, settings."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "processors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": l2_bytes(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        **where(),
    }


def where() -> dict[str, Any]:
    """What does not ask the GPU."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("TRITON_", "LOWBIT_"))},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with a + behind it where files differ; None where there is no git."""
    root = Path(__file__).parent.parent
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str:
        return subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def driver() -> str | None:
    """The driver's version, the highest clocks and the power limit, as nvidia-smi says them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    found = subprocess.run(
        [tool, f"--query-gpu={_DRIVER}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip().partition("\n")[0] or None


def l2_bytes() -> int:
    """The size of the L2."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def copy_bandwidth(nbytes: int = COPY_BYTES) -> float:
    """Bytes read and written a second, by PyTorch's copy of a large buffer."""
    source = torch.zeros(nbytes // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / _least(lambda: target.copy_(source))


def peaks(size: int = PEAK_SIZE) -> dict[str, float]:
    """FLOP/s of products of two matrices [size, size] by PyTorch, by dtype; those that it can multiply."""
    plain = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    eights = plain.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    runs: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: F.linear(plain, plain),
        "int8": lambda: torch._int_mm(codes, codes.t()),
        "fp8": lambda: torch._scaled_mm(eights, eights.t(), one, one, out_dtype=torch.bfloat16),  # noqa: SLF001
    }
    found = {}
    for name, run in runs.items():
        try:
            found[name] = 2 * size**3 / _middle(run)
        except RuntimeError:  # noqa: PERF203  (this GPU or build has no such product)
            continue
    return found


def _times(run: Callable[[], object]) -> list[float]:
    run()
    torch.cuda.synchronize()
    return [event_seconds(run) for _ in range(_RUNS)]


def _least(run: Callable[[], object]) -> float:
    return min(_times(run))


def _middle(run: Callable[[], object]) -> float:
    return statistics.median(_times(run))
