"""Devices: whether something can be computed there, how much memory is free, and one error where it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import torch

from lowbit.errors import PlanError, SolverError

_FULL = ("out of memory", "ALLOC_FAILED")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name, with its index. Raises `PlanError` for one that cannot be used.

    That is one which is not here, has no values ("meta"), or no float64, which solvers judge in.
    """
    try:
        probe = torch.ones((1, 1), dtype=torch.float64, device=device)
        if probe.is_cuda:  # loads a library, which PyTorch does not let two threads do at once
            torch.linalg.inv(probe)
        probe.item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(f"device {str(device)!r}: cannot be used: {said}; name another, such as cpu or cuda") from error
    return probe.device


@contextmanager
def enough_memory(device: torch.device, where: str) -> Iterator[None]:
    """Say of a layer that the device's memory did not suffice for, and what helps. Raises `SolverError`."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what cuBLAS and cuSOLVER lack
        if not isinstance(error, torch.OutOfMemoryError) and not any(word in str(error) for word in _FULL):
            raise
        raise SolverError(
            f"{where}: the memory of {device} does not suffice to solve it beside others; let one layer be worked on "
            "at a time (--jobs 1), free memory there, or solve on the cpu"
        ) from error


def free_bytes(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where that is not known (psutil may lack beside a bare source tree)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or util.find_spec("psutil") is None:
        return None
    import psutil

    free = int(psutil.virtual_memory().available)
    used = int(psutil.Process().memory_info().rss)
    return min([free, *(max(limit - used, 0) for limit in _limits())])


def _limits() -> list[int]:
    """What the container allows, which the machine's own numbers do not show."""
    found = []
    for name in _LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" is none
            found.append(int(text))
    return found
