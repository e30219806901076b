"""The launches of every Triton kernel in the dispatch table, made without a GPU, and what compiling them must give.

An entry is called with example arguments on the meta device (kernel_examples.py), for few and for many tokens, while
launches are recorded and the device is taken for some target. An entry for which there are none, or which refuses all
of them, is an error: nothing escapes the compiler by being forgotten.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit import dispatch
from lowbit.backends.triton.compile_ahead import Compiled, compile_launch
from lowbit.backends.triton.device import Target, assume
from lowbit.backends.triton.tuning import KERNELS, Config, Launch, TunedKernel, record
from lowbit.dispatch import Kernel
from tests.support.kernel_examples import COLD, Arguments, Sizes, examples, title

SHAPE = (2048, 2048)  # N, K: large enough that K is not split for many tokens; packing a larger one takes seconds
# Every bucket up to the last number of tokens at which anything changes, one number that fills none, and many.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 200, 256, 512, 1024, 2048, 16384)
FEW_TOKENS = (1, 200, 16384)
DTYPES = (torch.bfloat16, torch.float16)

_KIB = 1024
# Shared memory of one program, in bytes.
SHARED = {
    "sm_75": 64 * _KIB, "sm_80": 163 * _KIB, "sm_86": 99 * _KIB, "sm_89": 99 * _KIB, "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB, "sm_120": 99 * _KIB, "gfx942": 64 * _KIB,
}  # fmt: skip
TARGETS = {
    name: Target("hip", processors=304) if name.startswith("gfx") else Target("cuda", divmod(int(name[3:]), 10))
    for name in SHARED
}
_STORES = re.compile(r"\bst\.global|\bred\.|\batom\.|cp\.async\.bulk|(?:global|buffer|flat)_(?:store|atomic)")
_SPREAD = re.compile(r"(%\w+) = tt\.splat %([mn]) : i32")
_PRODUCT = re.compile(r"arith\.muli (%\w+), (%\w+) : tensor<\S*xi32>")


def entries() -> list[Kernel]:
    """Everything that is registered for the backend triton."""
    if (why := dispatch.load("triton")) is not None:
        raise RuntimeError(f"the triton backend is not there: {why}")
    return [entry for entry in dispatch.table() if entry.backend == "triton"]


@dataclass(frozen=True)
class Noted:
    """A recorded launch, what launched it, whether a forward runs it, and the tile shapes that it may run in.

    `first` are those that come first for some number of tokens, and run where nothing can be timed: they have to be
    good. `others` are those that no number of tokens puts first.
    """

    launch: Launch
    by: str
    what: str
    hot: bool
    first: tuple[Config, ...]
    others: tuple[Config, ...]

    @classmethod
    def of(cls, launch: Launch, entry: Kernel, what: str) -> Noted:
        """What an entry launched."""
        return cls(launch, title(entry), what, entry.op not in COLD, launch.configs[:1], launch.configs[1:])

    @property
    def configs(self) -> tuple[Config, ...]:
        """Every tile shape."""
        return (*self.first, *self.others)

    def with_shapes_of(self, other: Noted) -> Noted:
        """One for two launches that the compiler cannot tell apart: hot if either is, with the tile shapes of both."""
        first = tuple(dict.fromkeys((*self.first, *other.first)))
        others = tuple(one for one in dict.fromkeys((*self.others, *other.others)) if one not in first)
        return replace(other if other.hot and not self.hot else self, first=first, others=others)

    @property
    def kernel(self) -> TunedKernel:
        """The kernel."""
        return self.launch.kernel

    @property
    def variant(self) -> tuple[Any, ...]:
        """What the compiler sees of it."""
        return variant_of(self.launch)


def variant_of(launch: Launch) -> tuple[Any, ...]:
    """What of the arguments the compiler sees: launches that are alike here are compiled once a tile shape."""
    found = []
    for parameter in launch.kernel.function.params:
        value = launch.arguments.get(parameter.name)
        if isinstance(value, Tensor):
            value = value.dtype
        elif not parameter.is_constexpr and isinstance(value, int):
            wide = not -(1 << 31) <= value < 1 << 31
            value = (wide, None if parameter.do_not_specialize else (value == 1, value % 16 == 0))
        found.append((parameter.name, str(getattr(value, "value", value))))
    return (id(launch.kernel), *found)


class MissingExampleError(Exception):
    """An entry that was launched by nothing, with the reasons."""


def noted(entry: Kernel, target: Target, *, tokens: Sequence[int] = TOKENS, dtypes=DTYPES) -> list[Noted]:
    """The launches of an entry on a target, each variant once. Raises `MissingExampleError` when there is none."""
    found: list[Noted] = []
    refusals: dict[str, str] = {}
    tried = False
    for dtype in dtypes:
        for m in tokens:
            for what, arguments in examples(entry, Sizes(*SHAPE, m, dtype)):
                tried = True
                with assume(target), record() as launches:
                    why = entry.refuses(*arguments) if entry.refuses else None
                    if why is None:
                        _call(entry, arguments, launches)
                if why is not None:
                    refusals[what] = why
                found += [Noted.of(launch, entry, what) for launch in launches]
    if not found:
        said = "; ".join(f"{what}: {why}" for what, why in refusals.items()) or "it launches nothing"
        why = said if tried else "tests/support/kernel_examples.py has no example arguments for this op"
        raise MissingExampleError(f"{title(entry)} ({entry.name}) is not compiled: {why}")
    return _once(found)


def _once(found: Iterable[Noted]) -> list[Noted]:
    """Each variant once, with the tile shapes of all that are alike."""
    once: dict[tuple[Any, ...], Noted] = {}
    for one in found:
        known = once.get(variant := one.variant)
        once[variant] = known.with_shapes_of(one) if known else one
    return list(once.values())


def _call(entry: Kernel, arguments: Arguments, launches: Sequence[Launch]) -> None:
    """Run an entry on tensors without values.

    What looks at values (a check that a weight is finite) ends the call; what came before it is noted.
    """
    try:
        entry.run(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        if not launches or "meta" not in str(error).lower():
            raise


@cache
def all_noted(target: str = "sm_90", few: bool = True) -> tuple[dict[str, list[Noted]], dict[str, str]]:
    """The launches of every entry by its title, and why an entry has none; `few` tokens and one dtype, or all."""
    found: dict[str, list[Noted]] = {}
    missing: dict[str, str] = {}
    dtypes = (torch.float16,) if TARGETS[target].capability == (7, 5) else DTYPES[:1] if few else DTYPES
    for entry in entries():
        try:
            launches = noted(entry, TARGETS[target], tokens=FEW_TOKENS if few else TOKENS, dtypes=dtypes)
            found.setdefault(title(entry), []).extend(launches)
        except MissingExampleError as error:  # noqa: PERF203  (every entry is tried)
            missing[title(entry)] = str(error)
        except Exception as error:  # noqa: BLE001  (one broken entry must not hide the others)
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            missing[title(entry)] = f"{title(entry)} ({entry.name}) raises {error!r} at {where}"
    return found, missing


def distinct(found: Mapping[str, Sequence[Noted]]) -> list[Noted]:
    """Each variant of each kernel once, whatever launched it; hot if anything that launches it is."""
    return _once(one for many in found.values() for one in many)


def qualified(kernel: TunedKernel) -> str:
    """`module.function` of a kernel, within the backend."""
    return f"{kernel.function.__module__.rpartition('.')[2]}.{kernel.name}"


def unlaunched(found: Mapping[str, Sequence[Noted]]) -> list[str]:
    """Kernels that no entry launched."""
    launched = {id(one.kernel) for many in found.values() for one in many}
    return [qualified(kernel) for kernel in KERNELS if id(kernel) not in launched]


@dataclass(frozen=True)
class Verdict:
    """What became of one config of a launch. `fault` is why it cannot stay, `note` what is worth knowing."""

    made: Compiled | None
    fault: str = ""
    note: str = ""


def narrow_products(source: str) -> list[str]:
    """Which of m and n, in Triton's form of a kernel, multiply a tensor of 32-bit numbers.

    A result [m, n] may have more elements than 32 bits count, and more than 2**23 columns: what is multiplied by
    either is an address. Sums are not looked at, nor products by k, which integer products bound.
    """
    spread = dict(_SPREAD.findall(source))
    pairs = _PRODUCT.findall(source)
    return sorted({spread[one] for pair in pairs for one in pair if one in spread})


def judge(one: Noted, config: Config, target: str) -> Verdict:
    """Compile and judge. Those that come first have to be good: they run where nothing can be timed."""
    first = config in one.first
    try:
        made = compile_launch(one.launch, config, TARGETS[target])
    except Exception as error:  # noqa: BLE001  (Triton raises many kinds; the text tells)
        text = f"does not compile: {type(error).__name__}: {str(error).strip()[:500]}"
        return Verdict(None, fault=text)
    if not _STORES.search(made.assembly):
        return Verdict(made, fault="nothing is left of the kernel: it stores nothing (the compiler made it a trap)")
    if wraps := narrow_products(made.source):
        return Verdict(made, fault=f"multiplies places in a tile by {', '.join(wraps)} in 32 bits: addresses may wrap")
    if made.shared > SHARED[target]:
        text = f"needs {made.shared} bytes of shared memory, {target} has {SHARED[target]}"
        return Verdict(made, fault=text) if first else Verdict(made, note=f"passed over: {text}")
    if made.spills and one.hot:
        text = f"spills {made.spills} bytes a thread"
        return Verdict(made, fault=text) if first else Verdict(made, note=text)
    return Verdict(made)
