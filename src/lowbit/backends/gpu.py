"""The GPU that code is compiled for: the one at hand, or one that is assumed where there is none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_FIRST_WITH_BFLOAT16 = (8, 0)


@dataclass(frozen=True)
class Target:
    """What the code is compiled for: `kind` "cuda", "hip", "xpu" or "interpreter", and NVIDIA's compute capability."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    processors: int = 132
    """Streaming multiprocessors (compute units): how many programs run side by side."""

    @property
    def assembles(self) -> bool:
        """Whether kernels may use PTX: what it does is written out in Triton's own words for all other targets."""
        return self.kind == "cuda" and self.capability >= _FIRST_WITH_BFLOAT16


_assumed: ContextVar[Target | None] = ContextVar("lowbit_gpu", default=None)


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Within this block every device is taken for `target`: for compiling without one."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed() -> Target | None:
    """The target of the block of `assume` that this is in, or None."""
    return _assumed.get()


def target_of(device: torch.device) -> Target:
    """The target of a device, or the assumed one."""
    found = _assumed.get()
    return _read(device.type, device.index) if found is None else found


def every_one_has(capability: tuple[int, int]) -> bool:
    """Whether all NVIDIA GPUs of this machine, or the assumed one, have at least this compute capability."""
    found = _assumed.get()
    if found is not None:
        return found.capability >= capability
    return all(target_of(torch.device("cuda", i)).capability >= capability for i in range(torch.cuda.device_count()))


@functools.cache
def _read(kind: str, index: int | None) -> Target:
    if kind == "cuda":
        found = torch.cuda.get_device_properties(index)
        if getattr(torch.version, "hip", None):
            return Target("hip", processors=found.multi_processor_count)
        return Target("cuda", (found.major, found.minor), found.multi_processor_count)
    return Target(kind)
