"""The launches of every CUDA kernel in the dispatch table, made without a GPU, and what compiling them must give.

An entry is called with example arguments on the meta device (kernel_examples.py) for several shapes, numbers of tokens
and dtypes, for GPUs of one architecture with few and with many multiprocessors, while launches are recorded. An entry
without examples, one that refuses all of them on every architecture, and a `__global__` function that nothing launches
are errors: nothing escapes the compiler by being forgotten.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit import dispatch
from lowbit.backends.cuda import ahead, compiler
from lowbit.backends.cuda.compiler import Binary
from lowbit.backends.cuda.kernels import Launch, record
from lowbit.backends.gpu import Target, assume
from lowbit.dispatch import Kernel
from tests.support.kernel_examples import COLD, NAMED, Arguments, Sizes, examples, title

SHAPES = ((2048, 2048), (18432, 3072), (64, 1024))  # N, K: middling, large, and so few rows that K may be split
TOKENS = (1, 2, 3, 5, 8, 16, 33, 64, 128, 256, 1024, 4096)
FEW_TOKENS = (1, 8, 100, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROCESSORS = (20, 132)

_KIB = 1024
SHARED = {
    "sm_80": 163 * _KIB, "sm_86": 99 * _KIB, "sm_89": 99 * _KIB, "sm_90a": 227 * _KIB, "sm_100a": 227 * _KIB,
    "sm_120a": 99 * _KIB,
}  # fmt: skip
"""Shared memory that one block may have, in bytes, by architecture."""


def capability(architecture: str) -> tuple[int, int]:
    """The compute capability of `sm_90a`."""
    major, minor = divmod(int(architecture.removeprefix("sm_").rstrip("af")), 10)
    return major, minor


@dataclass(frozen=True)
class Noted:
    """A recorded launch, what launched it, and whether a forward runs it."""

    launch: Launch
    by: str
    what: str
    hot: bool

    @property
    def function(self) -> str:
        """`file.cu: name` of its `__global__` function, without template arguments."""
        return f"{self.launch.source}: {function_of(self.launch.name)}"


def function_of(name: str) -> str:
    """The function of a launch's name: `f` of `lowbit::f<8>`."""
    return re.sub(r"<.*", "", name, flags=re.DOTALL).rpartition("::")[2].strip()


def entries() -> list[Kernel]:
    """Everything that is registered for the backend cuda."""
    if (why := dispatch.load("cuda")) is not None:
        raise RuntimeError(f"the cuda backend is not there: {why}")
    return [entry for entry in dispatch.table() if entry.backend == "cuda"]


def functions() -> list[str]:
    """`file.cu: name` of every `__global__` function of the backend."""
    found = []
    for path in sorted(compiler.FOLDER.glob("*.cu")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for match in re.finditer(r"__global__\s+(?:void\s+)?((?:__launch_bounds__|__cluster_dims__)\s*\()?", text):
            rest = text[match.end() :]
            if match[1]:
                rest = rest[_closing(rest) :]
            name = re.search(r"\b(\w+)\s*\(", rest)
            assert name, f"{path.name}: a __global__ function without a name"
            found.append(f"{path.name}: {name[1]}")
    return found


def _closing(text: str) -> int:
    """Where the bracket that is open at the beginning is closed."""
    depth = 1
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if not depth:
            return place + 1
    raise AssertionError(text[:200])


def noted(entry: Kernel, architecture: str, *, tokens: Sequence[int], dtypes=DTYPES) -> tuple[list[Noted], str]:
    """The launches of an entry on an architecture, each variant once; and why there is none."""
    found: dict[Launch, Noted] = {}
    refusals: dict[str, str] = {}
    tried = False
    for sizes in (Sizes(n, k, m, dtype) for dtype in dtypes for n, k in SHAPES for m in tokens):
        for what, arguments in _examples(entry, sizes):
            tried = True
            for processors in PROCESSORS:
                with assume(Target("cuda", capability(architecture), processors)), record() as launches:
                    why = entry.refuses(*arguments) if entry.refuses else None
                    if why is None:
                        entry.run(*arguments)
                    else:
                        refusals[what] = why
                for launch in launches:
                    found.setdefault(launch, Noted(launch, title(entry), what, entry.op not in COLD))
    if found:
        return list(found.values()), ""
    said = "; ".join(f"{what}: {why}" for what, why in refusals.items()) or "it launches nothing"
    why = said if tried else "tests/support/kernel_examples.py has no example arguments for this op"
    return [], f"{title(entry)} ({entry.name}) launches nothing on {architecture}: {why}"


def _examples(entry: Kernel, sizes: Sizes) -> Iterator[tuple[str, Arguments]]:
    """Those of the table; where parts may be float32 beside activations of 16 bits, such ones, too."""
    for what, arguments in examples(entry, sizes):
        yield what, arguments
        if sizes.dtype.itemsize == 2 and entry.op not in NAMED:
            wide = tuple(_wide(value) if isinstance(value, dict) else value for value in arguments)
            yield f"{what}, parts in float32", wide


def _wide(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    halves = (torch.bfloat16, torch.float16)
    return {name: part.float() if part.dtype in halves else part for name, part in parts.items()}


@cache
def all_noted(architecture: str, few: bool = True) -> tuple[dict[str, list[Noted]], dict[str, str]]:
    """The launches of every entry by its title, and why an entry has none; for `few` numbers of tokens, or all."""
    found: dict[str, list[Noted]] = {}
    missing: dict[str, str] = {}
    probes = ahead.probes(architecture)
    found["every launch on a GPU"] = [Noted(probe, "the first call", probe.source, hot=False) for probe in probes]
    for entry in entries():
        try:
            launches, why = noted(entry, architecture, tokens=FEW_TOKENS if few else TOKENS)
        except Exception as error:  # noqa: BLE001  (one broken entry must not hide the others)
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            launches, why = [], f"{title(entry)} ({entry.name}) raises {error!r} at {where}"
        if launches:
            found.setdefault(title(entry), []).extend(launches)
        else:
            missing[title(entry)] = why
    return found, missing


def distinct(found: dict[str, list[Noted]]) -> list[Noted]:
    """Each variant once, whatever launched it; hot if anything that launches it is."""
    once: dict[tuple[str, str], Noted] = {}
    for one in (one for many in found.values() for one in many):
        key = (one.launch.source, one.launch.name)
        known = once.setdefault(key, one)
        if one.launch.shared > known.launch.shared or (one.hot and not known.hot):
            once[key] = Noted(
                max(one.launch, known.launch, key=lambda launch: launch.shared), one.by, one.what, one.hot or known.hot
            )
    return list(once.values())


def nowhere(architectures: Sequence[str], few: bool = True) -> list[str]:
    """Why entries are launched on none of these architectures, and the `__global__` functions that nothing launches."""
    rounds = [all_noted(architecture, few) for architecture in architectures]
    titles = [set(missing) for _, missing in rounds]
    said = [rounds[-1][1][name] for name in sorted(set.intersection(*titles))]
    launched = {one.function for found, _ in rounds for one in distinct(found)}
    return said + [f"{name}: no entry launches it in the examples" for name in functions() if name not in launched]


@dataclass(frozen=True)
class Verdict:
    """What became of a launch on an architecture. `fault`: why it cannot stay, or ""."""

    made: Binary | None
    shared: int
    fault: str = ""


def judge(one: Noted, architecture: str, compile_one: Callable[..., Binary] = compiler.compile_now) -> Verdict:
    """Compile and judge."""
    launch: Any = one.launch
    try:
        made = compile_one(launch.source, launch.name, architecture)
    except Exception as error:  # noqa: BLE001  (the text tells)
        return Verdict(None, 0, f"does not compile: {str(error).strip()[:2000]}")
    shared = made.shared + launch.shared
    if made.warnings:
        return Verdict(made, shared, f"the compiler warns: {'; '.join(made.warnings)}")
    if shared > SHARED[architecture]:
        return Verdict(
            made, shared, f"needs {shared} bytes of shared memory, {architecture} has {SHARED[architecture]}"
        )
    if made.spills and one.hot:
        return Verdict(made, shared, f"spills {made.spills} bytes a thread")
    return Verdict(made, shared)
