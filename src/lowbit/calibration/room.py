"""How much memory second moments may take where the caller does not say: a share of what is free."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import util
from pathlib import Path

import torch

from .options import MEMORY

_GIB = 2**30
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1


def room_on(devices: Iterable[torch.device], *, gradients: bool) -> int:
    """Bytes, whole GiB where that is at least one: half of what is free on the fullest device, with gradients a third.

    Gradients take as much again. The rest is for activations. On devices whose free memory nobody tells, and for the
    CPU where psutil is not installed, `MEMORY`.
    """
    known = [free_bytes(device) for device in set(devices)]
    free = [found for found in known if found is not None]
    if not known or len(free) < len(known):
        return MEMORY
    share = min(free) // (3 if gradients else 2)
    return share // _GIB * _GIB or share


def free_bytes(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where that is not known."""
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
