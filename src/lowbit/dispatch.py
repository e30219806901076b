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
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lowbit.errors import DependencyError, UnsupportedError
from lowbit.formats.base import Format
from lowbit.layouts.base import fitting_layout

Refusal = Callable[..., "str | None"]
Fn = TypeVar("Fn", bound=Callable[..., Any])

# Backends in order of preference, with the device types whose tensors they may be given.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": ("cuda", "xpu", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu"),
    "cpu": ("cpu",),
    "eager": (),  # every device
}
ANY_FORMAT = "*"
ANY_LAYOUT = "*"  # a kernel for plain parts that may be given those of any layout, unpacked at every call
UNPACKS = "runs, but unpacks the layout at every call"


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
    packs: Callable[[], bool] | None = None
    """Whether weights should be put into its layout on this machine; None: always."""

    def reads(self, layout: str) -> bool:
        """Whether it takes the parts in this layout, or unpacked from it."""
        return self.layout == layout or (self.layout == ANY_LAYOUT and layout != "")

    @property
    def name(self) -> str:
        """`backend:function`, as messages and `doctor` show it."""
        return f"{self.backend}:{self.run.__name__}"


@dataclass
class _State:
    kernels: dict[tuple[str, str], list[Kernel]] = field(default_factory=dict)
    loaded: dict[str, str | None] = field(default_factory=dict)  # backend -> None, or why it is not there
    refused: dict[str, str] = field(default_factory=dict)  # backend -> why what the user asked of it is not there
    candidates: dict[tuple[str | None, ...], tuple[Kernel, ...]] = field(default_factory=dict)
    """What `candidates` and `select` have found, by what they were asked."""


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
    packs: Callable[[], bool] | None = None,
) -> Callable[[Fn], Fn]:
    """Register the decorated function as the kernel of `op` for `format` on `backend`.

    `refuses` takes the kernel's own arguments and returns the first reason why it cannot run, in words, or None.
    `layout` names the kernel layout it reads: "" is the plain parts, `ANY_LAYOUT` plain parts that the op unpacks from
    any layout, for calls that nobody else takes. `packs` says whether this machine can run it at all: where it cannot,
    no weight is put into its layout. A second kernel for the same place is refused.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")

    def add(function: Fn) -> Fn:
        entry = Kernel(op, format, backend, layout, tolerance, refuses, function, packs)
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
            if isinstance(error, DependencyError) and error.asked_for:
                _STATE.refused[name] = str(error)
            missing = isinstance(error, ModuleNotFoundError) and error.name == f"lowbit.backends.{name}"
            _STATE.loaded[name] = "not part of this build" if missing else f"{type(error).__name__}: {error}"
        _STATE.candidates.clear()
    return _STATE.loaded[name]


def candidates(op: str, format: str, device: str) -> tuple[Kernel, ...]:
    """The kernels that may serve an op on a device, the preferred one first. Loads the backends they live in.

    Raises `DependencyError` where the user has asked for something of one of them that is not there.
    """
    key = (op, format, device)
    found = _STATE.candidates.get(key)
    if found is None:
        backends = [name for name, devices in BACKENDS.items() if not devices or device in devices]
        for name in backends:
            load(name)
            if name in _STATE.refused:
                raise DependencyError(_STATE.refused[name])
        rows = [*_STATE.kernels.get((op, format), ()), *_STATE.kernels.get((op, ANY_FORMAT), ())]
        found = tuple(sorted(rows, key=lambda entry: list(BACKENDS).index(entry.backend)))
        found = tuple(entry for entry in found if entry.backend in backends)
        _STATE.candidates[key] = found
    return found


def select(op: str, format: str, layout: str, device: str, args: tuple[Any, ...]) -> Kernel:
    """The kernel that runs this call. Raises `UnsupportedError` with every refusal when there is none."""
    key = (op, format, device, layout, _forced.get())
    for entry in _STATE.candidates.get(key) or _readers(*key):
        if entry.refuses is None or entry.refuses(*args) is None:
            return entry
    what = f"{op} for {format}@{layout}" if layout else f"{op} for {format}"
    raise UnsupportedError(f"no kernel can run {what} on {device}:", explain(op, format, layout, device, args))


def _readers(op: str, format: str, device: str, layout: str, forced: str | None) -> tuple[Kernel, ...]:
    """The candidates that take parts in this layout, of one backend where it is forced; remembered for `select`."""
    entries = candidates(op, format, device)
    found = tuple(entry for entry in entries if forced in (None, entry.backend) and entry.reads(layout))
    _STATE.candidates[op, format, device, layout, forced] = found
    return found


def explain(op: str, format: str, layout: str, device: str, args: tuple[Any, ...]) -> dict[str, str]:
    """For every backend, what it would say to this call: "runs", `UNPACKS`, or the reason why not."""
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
            if not entry.reads(layout) and entry.layout != ANY_LAYOUT:
                wanted, found = entry.layout or "plain", layout or "plain"
                reasons.setdefault(
                    entry.name, f"reads layout {wanted!r}, not {found!r}; repack at load, or with lowbit.nn.repack_"
                )
            elif entry.reads(layout):
                runs = UNPACKS if entry.layout == ANY_LAYOUT else "runs"
                reasons[entry.name] = (entry.refuses(*args) if entry.refuses else None) or runs
    return reasons


def preferred_layout(op: str, fmt: Format, n: int, k: int, device: str) -> str:
    """The layout that a weight [n, k] should be in for `op` on a device type, "" for plain parts.

    It is that of the first kernel, in the order in which they are asked, whose layout the weight fits; of one backend's
    kernels those with a layout of their own come first, but for `embedding`: rows are looked up where they lie side by
    side. A layout that files hold, too, is for weights that come in it: none is put into it, and none into one that
    has to be asked for by name (`Layout.named`). For eager it is always the plain parts.
    """
    forced = _forced.get()
    entries = [entry for entry in candidates(op, fmt.name, device) if forced in (None, entry.backend)]
    for backend in (name for name in BACKENDS if name != "eager"):
        mine = [entry for entry in entries if entry.backend == backend and entry.layout != ANY_LAYOUT]
        mine = [entry for entry in mine if entry.packs is None or entry.packs()]
        if op == "embedding" and any(not entry.layout for entry in mine):
            return ""
        for entry in mine:
            layout = fitting_layout(entry.layout, fmt, n, k) if entry.layout else None
            if layout is not None and not layout.stored and not layout.named:
                return entry.layout
        if any(not entry.layout for entry in mine):
            return ""
    return ""


def has_kernel(format: str, layout: str, device: str) -> bool:
    """Whether a kernel other than eager's reads this layout of a format on a device type."""
    entries = [entry for op in ("linear", "embedding") for entry in candidates(op, format, device)]
    return any(entry.layout == layout and entry.backend != "eager" for entry in entries)


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
