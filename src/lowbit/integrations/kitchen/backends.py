"""Which backends there are, in comfy_kitchen's words. Which kernel runs is decided by `lowbit.dispatch`, for each call.

`use_backend` is strict: within it another backend never steps in.
"""

from __future__ import annotations

from typing import Any

from lowbit import dispatch
from lowbit.dispatch import use_backend

__all__ = ["list_backends", "use_backend"]


def list_backends() -> dict[str, dict[str, Any]]:
    """For every backend: available, disabled (never), unavailable_reason (or None) and the ops it has kernels for."""
    reasons = {name: dispatch.load(name) for name in dispatch.BACKENDS}
    kernels = dispatch.table()
    return {
        name: {
            "available": why is None,
            "disabled": False,
            "unavailable_reason": why,
            "capabilities": sorted({entry.op for entry in kernels if entry.backend == name}),
        }
        for name, why in reasons.items()
    }
