"""The options of `calibrate`, and amounts of memory in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lowbit.errors import PlanError

from .batches import TokenMask
from .collection import BROAD
from .gradients import Objective

MEMORY = 4 * 2**30  # bytes: room for a full second moment, in both halves, of up to 21,000 channels
AUTO = "auto"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Options:
    """How statistics are taken; what of it shapes the result is part of the file. Fields as `calibrate`'s arguments."""

    layers: tuple[str, ...] = ()
    memory: int | str | None = AUTO
    full_up_to: int | None = None
    token_mask: TokenMask | None = None
    share: bool = True
    seed: int = 0
    snapshot_every: float = 30.0
    broad: bool = False
    objective: Objective | None = None

    def facts(self) -> dict[str, Any]:
        """Those that shape the result, as JSON data."""
        return {
            "layers": list(self.layers),
            "memory": self.memory,
            "full_up_to": self.full_up_to,
            "share": self.share,
            "seed": self.seed,
            BROAD: self.broad,
            "gradients": "" if self.objective is None else _name_of(self.objective),
        }


def as_bytes(memory: int | str | None) -> int | str | None:
    """A number of bytes from "4GiB", "500 MB" or a number; "auto" and None stay. Raises `PlanError`."""
    if memory is None or str(memory).strip().lower() == AUTO:
        return memory if memory is None else AUTO
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory).lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise PlanError(f"memory {memory!r}: give a number of bytes, text such as '8GiB' or '500MB', or 'auto'")
    return int(float(found[1]) * _UNITS[found[2]])


def _name_of(objective: Objective) -> str:
    """What a file calls it: a function by its name, any other callable by its class."""
    return str(getattr(objective, "__name__", type(objective).__name__))
