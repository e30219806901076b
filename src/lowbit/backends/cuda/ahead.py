"""Compile ahead what linears will launch, for a GPU that need not be there.

A launcher runs on tensors without values, for a target that is assumed, while launches are recorded: what is compiled
is what will run. Kernels go into the cache where the first call looks for them.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.backends.cuda import compiler, device_check, hopper_check
from lowbit.backends.cuda.kernels import Launch, architecture, record
from lowbit.backends.gpu import Target, assume
from lowbit.dispatch import select
from lowbit.errors import UnsupportedError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, raw_bytes
from lowbit.layouts.base import get_layout

PROCESSORS = (16, 28, 40, 56, 72, 84, 108, 132, 148, 170, 192)
"""Numbers of multiprocessors to try for an architecture: which of its GPUs it will be is not known."""


def probes(architecture: str) -> list[Launch]:
    """What the first calls on a GPU launch, whatever they are."""
    found = [Launch(device_check.SOURCE, device_check.NAME)]
    if architecture == hopper_check.ARCHITECTURE:
        found.append(Launch(hopper_check.SOURCE, hopper_check.NAME, hopper_check.SHARED))
    return found


@dataclass(frozen=True)
class Linear:
    """A linear of some model: format (`Format.plain`) and layout of its weight [n, k], the dtype of x and of its parts.

    `dtypes`: of the parts whose dtype the format leaves open, by name; others are as the format makes them.
    """

    format: Format
    layout: str
    n: int
    k: int
    dtype: torch.dtype
    bias: bool
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    def arguments(self, m: int, device: torch.device) -> tuple[Format, Tensor, Parts, Tensor | None]:
        """What a kernel is called with for m tokens: without values on the meta device, zeros elsewhere."""
        parts = dict(_parts(self) if device.type == "meta" else self._zeros(device))
        x = torch.zeros((m, self.k), dtype=self.dtype, device=device)
        bias = torch.zeros(self.n, dtype=self.dtype, device=device) if self.bias else None
        return self.format, x, parts, bias

    def _zeros(self, device: torch.device) -> Parts:
        parts = self.format.empty_parts((self.n, self.k), device, self.dtype)
        for part in parts.values():
            raw_bytes(part).zero_()  # not every content has every layout
        return self._as_known(get_layout(self.layout, self.format).packed(self.format, parts) if self.layout else parts)

    def _as_known(self, parts: Parts) -> Parts:
        known = dict(self.dtypes)
        return {name: part.to(known.get(name, part.dtype)) for name, part in parts.items()}


@cache
def _parts(linear: Linear) -> Parts:
    """Those of a linear, without values: packing them takes longer than recording a call."""
    fmt, shape, meta = linear.format, (linear.n, linear.k), torch.device("meta")
    make = get_layout(linear.layout, fmt).empty_parts if linear.layout else None
    return linear._as_known(  # noqa: SLF001  (a part of the class)
        make(fmt, shape, meta, linear.dtype) if make else fmt.empty_parts(shape, meta, linear.dtype)
    )


@dataclass(frozen=True)
class Answer:
    """Who serves a call, as `backend:function`, and what that launches; only what is of CUDA is recorded."""

    kernel: str
    launches: tuple[Launch, ...]

    @property
    def backend(self) -> str:
        """The backend."""
        return self.kernel.partition(":")[0]


def target(name: str) -> Target:
    """The GPU that an architecture such as sm_90a is of. Raises `UnsupportedError` for what cannot be compiled for."""
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", name.strip())
    capability = (int(found[1]), int(found[2])) if found else (0, 0)
    known = [f"sm_{number}" for number in compiler.supported()]
    if f"sm_{capability[0]}{capability[1]}" not in known:
        raise UnsupportedError(f"{name!r} is no architecture that the compiler knows; it knows {', '.join(known)}")
    return Target("cuda", capability)


def answer(linear: Linear, m: int, target: Target) -> Answer:
    """Who serves a linear of m tokens on a GPU, and what it launches. Raises `UnsupportedError` when nobody does."""
    with assume(target), record() as launches:
        arguments = linear.arguments(m, torch.device("meta"))
        entry = select("linear", linear.format.name, linear.layout, "cuda", arguments)
        if entry.backend == "cuda":
            entry.run(*arguments)
    return Answer(entry.name, tuple(dict.fromkeys(launches)))


def run_once(linear: Linear, m: int, device: torch.device) -> None:
    """Call a linear on zeros: what compiles and tunes at the first call of a shape does it now."""
    arguments = linear.arguments(m, device)
    select("linear", linear.format.name, linear.layout, device.type, arguments).run(*arguments)


@dataclass(frozen=True)
class Made:
    """What became of a kernel: kept already, compiled in so many seconds, or at fault."""

    launch: Launch
    architecture: str
    kept: bool
    seconds: float = 0.0
    fault: str = ""

    @property
    def function(self) -> str:
        """The name of the kernel's function, without template arguments."""
        return self.launch.name.partition("<")[0].rpartition("::")[2]


def is_kept(launch: Launch, architecture: str) -> bool:
    """Whether a kernel is in the cache."""
    return compiler.is_kept(launch.source, launch.name, architecture)


def compile_all(wanted: Sequence[tuple[Launch, str]], jobs: int) -> Iterator[Made]:
    """Compile kernels for architectures into the cache, several at a time, each as it is done."""
    stop = threading.Event()

    def work(launch: Launch, architecture: str) -> Made:
        began = time.perf_counter()
        if stop.is_set() or is_kept(launch, architecture):
            return Made(launch, architecture, kept=True)
        try:
            compiler.compiled(launch.source, launch.name, architecture)
        except UnsupportedError as error:
            return Made(launch, architecture, kept=False, fault=str(error))
        return Made(launch, architecture, kept=False, seconds=time.perf_counter() - began)

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(work, *one) for one in wanted]
        try:
            for done in as_completed(running):
                yield done.result()
        finally:  # an interruption waits for no kernel that has not begun
            stop.set()


__all__ = [
    "PROCESSORS", "Answer", "Linear", "Made", "Target", "answer", "architecture", "compile_all", "is_kept", "probes",
    "run_once", "target",
]  # fmt: skip
