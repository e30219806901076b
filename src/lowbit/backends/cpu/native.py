"""The compiled kernels: which instruction set's module is used on this machine, and whose threads they run on.

There is one module an instruction set, all with the same functions. The one with the most instructions that this build
has and this machine can run is used; LOWBIT_CPU_ISA names another, and is refused rather than ignored where that one
is not there. LOWBIT_CPU_MODULES names the folder they lie in, where that is not this one.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from lowbit.errors import DependencyError

SETS = ("amx", "avx512", "avx2", "neon", "portable")  # the preferred first
EMULATED = ("avx512_emulated", "amx_emulated")  # for tests: never chosen by themselves
GET = "`scripts/build_native` compiles them in a checkout, `pip install` anew where a C++17 compiler (g++, clang++) is"


@functools.cache
def available() -> tuple[str, ...]:
    """The instruction sets that are built and that this machine can run, the preferred one first."""
    if _path("_machine") is None:
        return ()
    runnable = _load("_machine").runnable()
    built = [name for name in (*SETS, *EMULATED) if name in runnable and _path(f"_native_{name}")]
    return tuple(name for name in built if name != "amx" or not _load("_machine").why_no_tiles())


@functools.cache
def isa() -> str:
    """The instruction set that is used: LOWBIT_CPU_ISA, or the first available one. `DependencyError` without any."""
    usable = available()
    if not usable:
        raise DependencyError(f"no compiled kernels in {_folder()}: {GET}")
    asked = os.environ.get("LOWBIT_CPU_ISA", "")
    if not asked:
        return next((name for name in usable if name not in EMULATED), usable[0])
    if asked not in usable:
        why = f"LOWBIT_CPU_ISA={asked}: {_why_not(asked)}; usable here: {', '.join(usable)}"
        raise DependencyError(why, asked_for=True)
    return asked


@functools.cache
def module() -> ModuleType:
    """The module of `isa()`; its functions take addresses and sizes, and check nothing."""
    return _load(f"_native_{isa()}")


@functools.cache
def bf16_dots() -> bool:
    """Whether bfloat16 is multiplied two columns at once (native/bf16_gemm.h): the processor can, and is fast at it."""
    return bool(module().has_fast_bf16_dots())


threads = torch.get_num_threads  # how many a kernel is given at each call: as many as torch uses


def pool() -> str:
    """The library whose threads the kernels run on, such as "torch's libgomp.so.1"; or that there is none, and why."""
    used, about = module().pool()
    return about if used else f"none, the calling thread computes alone: {about}"


def _why_not(name: str) -> str:
    known = (*SETS, *EMULATED)
    if name not in known:
        return f"unknown instruction set; the known ones are {', '.join(known)}"
    if name not in _load("_machine").runnable():
        return "this machine cannot run it"
    if _path(f"_native_{name}") is None:
        return "not part of this build"
    return str(_load("_machine").why_no_tiles())


def _folder() -> Path:
    return Path(os.environ.get("LOWBIT_CPU_MODULES") or Path(__file__).parent)


def _path(name: str) -> Path | None:
    """The file of a compiled module, or None where it was not built for this Python."""
    paths = (_folder() / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _load(name: str) -> ModuleType:
    """Import a compiled module by its file, so that which one it is depends on nothing else."""
    full = f"{__package__}.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, _path(name))
        if spec is None or spec.loader is None:
            raise DependencyError(f"{_path(name)} is no module of this Python: {GET}")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        sys.modules[full] = loaded
    return sys.modules[full]
