"""How much memory second moments may take where the caller does not say: a share of what is free."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lowbit.devices import free_bytes

from .options import MEMORY

_GIB = 2**30


def room_on(devices: Iterable[torch.device], *, gradients: bool) -> int:
    """Bytes, whole GiB where that is at least one: half of what is free on the fullest device, with gradients a third.

    Gradients take as much again. The rest is for activations. On devices whose free memory nobody tells, `MEMORY`.
    """
    known = [free_bytes(device) for device in set(devices)]
    free = [found for found in known if found is not None]
    if not known or len(free) < len(known):
        return MEMORY
    share = min(free) // (3 if gradients else 2)
    return share // _GIB * _GIB or share
