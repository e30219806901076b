"""Devices: whether something can be computed there, how much memory is free, and one error where it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import torch

from lowbit.errors import PlanError, SolverError

_FULL = ("out of memory", "ALLOC_FAILED")
# The limit of the outermost control group that is seen, version 2 and 1; each group below has a folder with its own.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_OWN_GROUPS = "/proc/self/cgroup"


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
            f"{where}: the memory of {device} does not suffice for it beside others; let one layer be worked on at a "
            "time (--jobs 1), free memory there, or take the cpu"
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
    """What the process's control group (a container, a service, a batch job) and those above it allow.

    The machine's own numbers do not show it.
    """
    found = []
    for limit, own in zip(map(Path, _LIMITS), _own_groups(), strict=True):
        for group in (own, *own.parents):
            text = _text(limit.parent / group / limit.name).strip()
            if text.isdecimal():  # "max" is none
                found.append(int(text))
    return found


def _own_groups() -> tuple[Path, Path]:
    """The groups of the process in version 2 and in version 1's controller of memory, below the outermost one.

    A container may see folders of its own groups alone and the names of the machine's: those are not there.
    """
    found = [Path(), Path()]
    for line in _text(_OWN_GROUPS).splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            found[bool(controllers)] = Path(name.lstrip("/"))
    return found[0], found[1]


def _text(path: str | Path) -> str:
    """What a file of the system says; "" where it is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
