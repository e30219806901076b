"""Devices: whether something can be computed there, how much memory is free, and one error where it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import torch

from lowbit.errors import PlanError, SolverError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises `PlanError` for one that is not here, and for "meta", which has no values."""
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        said = str(error).strip().splitlines()[0]
        raise PlanError(f"device {str(device)!r}: cannot be used: {said}; name another, such as cpu or cuda") from error
    return found


@contextmanager
def enough_memory(device: torch.device, where: str) -> Iterator[None]:
    """Say of a layer that the device's memory did not suffice for, and what helps. Raises `SolverError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
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
