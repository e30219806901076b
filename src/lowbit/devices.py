"""The device that a caller names: whether something can be computed there, and one error where its memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowbit.errors import PlanError, SolverError


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
