"""Which kernel runs: one table, one rule, and a reason for every refusal.

A kernel is a function registered for one op and one format (or all), on one backend. `select` walks the backends in the
order cuda, triton, cpu, eager; the first kernel that does not refuse runs. When none does, the error lists what each
said. Nothing falls back inside a kernel: an exception there propagates.

A backend is a package `lowbit.backends.<name>`, imported when a tensor of one of its devices is first used. One that
cannot be imported is recorded with the reason, which `lowbit doctor` shows, and is then passed over.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lowbit.errors import UnsupportedError

Refusal = Callable[..., "str | None"]
Fn = TypeVar("Fn", bound=Callable[..., Any])

# Backends in order of preference, with the device types whose tensors they may be given.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": ("cuda", "xpu", "cpu"),  # on a CPU only under TRITON_INTERPRET=1; its kernels refuse otherwise
    "cpu": ("cpu",),
    "eager": (),  # every device
}
ANY_FORMAT = "*"


@dataclass(frozen=True)
class Kernel:
    """One entry of the table. `tolerance` is the largest RMS error relative to the eager result that it may show."""

    op: str
    format: str
    backend: str
    layout: str
    tolerance: float
    refuses: Refusal | None
    run: Callable[..., Any]

    @property
    def name(self) -> str:
        """`backend:function`, as messages and `doctor` show it."""
        return f"{self.backend}:{self.run.__name__}"


@dataclass
class _State:
    kernels: dict[tuple[str, str], list[Kernel]] = field(default_factory=dict)
    loaded: dict[str, str | None] = field(default_factory=dict)  # backend -> None, or why it is not there
    candidates: dict[tuple[str, str, str], tuple[Kernel, ...]] = field(default_factory=dict)


_STATE = _State()
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowbit_backend", default=None)


def kernel(
    op: str,
    *,
    backend: str,
    format: str = ANY_FORMAT,
    layout: str = "",
    refuses: Refusal | None = None,
    tolerance: float = 0.0,
) -> Callable[[Fn], Fn]:
    """Register the decorated function as the kernel of `op` for `format` on `backend`.

    `refuses` takes the kernel's own arguments and returns the first reason why it cannot run, in words, or None.
    `layout` names the kernel layout it reads ("" is the plain parts). A second kernel for the same place is refused.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")

    def add(function: Fn) -> Fn:
        entry = Kernel(op, format, backend, layout, tolerance, refuses, function)
        row = _STATE.kernels.setdefault((op, format), [])
        if any(other.backend == backend and other.layout == layout for other in row):
            raise UnsupportedError(f"{entry.name}: {op} for {format} on {backend} is registered already")
        row.append(entry)
        _STATE.candidates.clear()
        return function

    return add


def load(name: str) -> str | None:
    """Import a backend once. Returns None when it is there, else the reason why it is not."""
    if name not in _STATE.loaded:
        try:
            importlib.import_module(f"lowbit.backends.{name}")
            _STATE.loaded[name] = None
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == f"lowbit.backends.{name}"
            _STATE.loaded[name] = "not part of this build" if missing else f"{type(error).__name__}: {error}"
        _STATE.candidates.clear()
    return _STATE.loaded[name]


def candidates(op: str, format: str, device: str) -> tuple[Kernel, ...]:
    """The kernels that may serve an op on a device, the preferred one first. Loads the backends they live in."""
    key = (op, format, device)
    found = _STATE.candidates.get(key)
    if found is None:
        backends = [name for name, devices in BACKENDS.items() if not devices or device in devices]
        for name in backends:
            load(name)
        rows = [*_STATE.kernels.get((op, format), ()), *_STATE.kernels.get((op, ANY_FORMAT), ())]
        found = tuple(sorted(rows, key=lambda entry: list(BACKENDS).index(entry.backend)))
        found = tuple(entry for entry in found if entry.backend in backends)
        _STATE.candidates[key] = found
    return found


def select(op: str, format: str, layout: str, device: str, args: tuple[Any, ...]) -> Kernel:
    """The kernel that runs this call. Raises `UnsupportedError` with every refusal when there is none."""
    forced = _forced.get()
    for entry in candidates(op, format, device):
        if forced is not None and entry.backend != forced:
            continue
        if entry.layout not in (layout, ANY_FORMAT):
            continue
        if entry.refuses is None or entry.refuses(*args) is None:
            return entry
    what = f"{op} for {format}@{layout}" if layout else f"{op} for {format}"
    raise UnsupportedError(f"no kernel can run {what} on {device}:", explain(op, format, layout, device, args))


def explain(op: str, format: str, layout: str, device: str, args: tuple[Any, ...]) -> dict[str, str]:
    """For every backend, what it would say to this call: "runs", or the reason why not."""
    reasons: dict[str, str] = {}
    forced = _forced.get()
    entries = candidates(op, format, device)
    for name, devices in BACKENDS.items():
        mine = [entry for entry in entries if entry.backend == name]
        if devices and device not in devices:
            reasons[name] = f"does not run on {device} tensors"
        elif (why := load(name)) is not None:
            reasons[name] = why
        elif forced is not None and name != forced:
            reasons[name] = f"use_backend({forced!r}) is in force"
        elif not mine:
            reasons[name] = f"has no kernel for {op} of {format}"
        for entry in mine if name not in reasons else ():
            if entry.layout not in (layout, ANY_FORMAT):
                wanted, found = entry.layout or "plain", layout or "plain"
                reasons[entry.name] = f"reads layout {wanted!r}, not {found!r}; repack at load"
            else:
                reasons[entry.name] = (entry.refuses(*args) if entry.refuses else None) or "runs"
    return reasons


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this block only `name` may run: strict, it raises rather than use another backend.

    Follows the context (thread or task); raises `UnsupportedError` for an unknown or missing backend.
    """
    if name not in BACKENDS:
        raise UnsupportedError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    why = load(name)
    if why is not None:
        raise UnsupportedError(f"the {name} backend cannot be used: {why}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def table() -> list[Kernel]:
    """Every registered kernel, by op, format and backend."""
    rows = [entry for row in _STATE.kernels.values() for entry in row]
    return sorted(rows, key=lambda entry: (entry.op, entry.format, entry.backend))
