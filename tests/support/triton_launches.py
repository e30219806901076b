"""The launches of every Triton kernel in the dispatch table, made without a GPU, and what compiling them must give.

An entry is called with example arguments on the meta device, for few and for many tokens, while launches are recorded
and the device is taken for some target. Entries that work by a format are tried with every spec of it that has a golden
number; ops with a name of their own have their arguments in `NAMED`. An entry for which this table has none, or which
refuses all of them, is an error: nothing escapes the compiler by being forgotten.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit import dispatch
from lowbit.backends.triton.compile_ahead import Compiled, compile_launch
from lowbit.backends.triton.device import Target, assume
from lowbit.backends.triton.tuning import KERNELS, Config, Launch, TunedKernel, record
from lowbit.dispatch import Kernel
from lowbit.errors import LowbitError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.layouts.base import get_layout
from lowbit.layouts.scale_128x4 import swizzled_shape
from tests.support.specs import ALL_SPECS

META = torch.device("meta")
SHAPE = (2048, 2048)  # N, K: large enough that K is not split for many tokens; packing a larger one takes seconds
TOKENS = (1, 16, 64, 256, 16384)
FEW_TOKENS = (1, 200, 16384)
DTYPES = (torch.bfloat16, torch.float16)
MORE_SPECS = (
    "fp8_e4m3(granularity=row)", "fp8_e5m2(granularity=row)", "int8(granularity=row)", "int8(granularity=tensor)",
    "int8(granularity=block)", "int8(rotation=256)", "wna16(group_size=64,zero_point=true)", "wna16(bits=8)",
    "svdquant_w4a4(act_unsigned=True)", "nvfp4(row_global_scale=True)",
    "awq_w4a16(group_size=256)", "wna16(group_size=0,zero_point=true)",
)  # fmt: skip
# Ops that a forward never runs: what they cost in registers is of no interest, only that they compile.
COLD = ("pack", "unpack", "row_errors", "scale_search", "gptq_columns", "descent_columns", "refit_unit")

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


@dataclass(frozen=True)
class Sizes:
    """What an example is made for: a weight [n, k], m tokens, and the dtype of activations."""

    n: int
    k: int
    m: int
    dtype: torch.dtype

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor without values, of this dtype."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=META)

    @property
    def x(self) -> Tensor:
        """Activations [m, k]."""
        return self.empty(self.m, self.k)

    @property
    def bias(self) -> Tensor:
        """A bias [n]."""
        return self.empty(self.n)


Arguments = tuple[Any, ...]
_RANK, _GROUP, _ROTATION = 32, 64, 256
_F32, _I8, _U8 = torch.float32, torch.int8, torch.uint8
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _awq(s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    scale = s.empty(s.k // _GROUP, s.n)
    return s.empty(s.n, s.k // 2, dtype=_I8), scale, torch.empty_like(scale)


def _coalesced(s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    scale = s.empty(s.n, s.k // _GROUP)
    return s.empty(s.n, s.k // 2, dtype=_U8), scale, torch.empty_like(scale)


def _one(s: Sizes) -> Tensor:
    return s.empty(dtype=_F32)


def _nvfp4(s: Sizes, rows: int) -> tuple[Tensor, Tensor]:
    scale = s.empty(*swizzled_shape(rows, s.k // 16), dtype=torch.float8_e4m3fn)
    return s.empty(rows, s.k // 2, dtype=_U8), scale


def _mxfp8(s: Sizes, rows: int) -> tuple[Tensor, Tensor]:
    scale = s.empty(*swizzled_shape(rows, s.k // 32), dtype=torch.float8_e8m0fnu)
    return s.empty(rows, s.k, dtype=torch.float8_e4m3fn), scale


def _scaled_mm_nvfp4(s: Sizes) -> Iterator[Arguments]:
    (a, a_scale), (b, b_scale) = _nvfp4(s, s.m), _nvfp4(s, s.n)
    yield a, b, _one(s), _one(s), a_scale, b_scale, s.bias, s.dtype, None
    yield a, b, _one(s), _one(s), a_scale, b_scale, None, s.dtype, _one(s)


def _scaled_mm_mxfp8(s: Sizes) -> Iterator[Arguments]:
    (a, a_scale), (b, b_scale) = _mxfp8(s, s.m), _mxfp8(s, s.n)
    yield a, b, a_scale, b_scale, s.bias, s.dtype


def _quantize_svdquant(s: Sizes) -> Iterator[Arguments]:
    for unsigned in (False, True):
        yield s.x, s.empty(s.k), s.empty(s.k, _RANK), 1, unsigned, s.x if unsigned else None


def _scaled_mm_svdquant(s: Sizes) -> Iterator[Arguments]:
    groups = s.k // 64
    low = s.empty(s.m, _RANK, dtype=_F32)
    for unsigned in (False, True):
        yield (
            s.empty(s.m, s.k // 2, dtype=_I8), s.empty(s.n, s.k // 2, dtype=_I8), s.empty(groups, s.m),
            s.empty(groups, s.n), low, s.empty(s.n, _RANK), s.bias, unsigned,
        )  # fmt: skip


def _dequantize_int8(s: Sizes) -> Iterator[Arguments]:
    codes = s.empty(s.n, s.k, dtype=_I8)
    for shape in ((), (s.n, 1)):
        yield codes, s.empty(*shape, dtype=_F32), s.dtype


def _int8_linear(s: Sizes) -> Iterator[Arguments]:
    for rotation in (0, _ROTATION):
        yield s.x, s.empty(s.n, s.k, dtype=_I8), s.empty(s.n, 1, dtype=_F32), s.bias, s.dtype, rotation
    yield s.x, s.empty(s.n, s.k, dtype=_I8), _one(s), None, s.dtype, 0


# By the name of an op of its own: the arguments that its kernels are called with.
NAMED: dict[str, Callable[[Sizes], Iterator[Arguments]]] = {
    "dequantize_int8": _dequantize_int8,
    "dequantize_mxfp8": lambda s: iter([(*_mxfp8(s, s.n), s.dtype)]),
    "dequantize_nvfp4": lambda s: (
        (codes, _one(s), scale, s.dtype, first) for codes, scale in (_nvfp4(s, s.n),) for first in (True, False)
    ),
    "dequantize_per_tensor_fp8": lambda s: ((s.empty(s.n, s.k, dtype=code), _one(s), s.dtype) for code in _FP8),
    "gemv_awq_w4a16": lambda s: iter([(s.x, *_awq(s), s.bias, _GROUP)]),
    "gemv_awq_w4a16_input_gradient": lambda s: iter([(s.empty(s.m, s.n), *_awq(s), _GROUP)]),
    "int4_plain_mm": lambda s: iter([(s.x, *_coalesced(s), s.bias, _GROUP)]),
    "int4_plain_mm_input_gradient": lambda s: iter([(s.empty(s.m, s.n), *_coalesced(s), _GROUP)]),
    "int8_linear": _int8_linear,
    "int8_linear_input_gradient": lambda s: iter(
        [(s.empty(s.m, s.n), s.empty(s.n, s.k, dtype=_I8), s.empty(s.n, 1, dtype=_F32), 0)]
    ),
    "quantize_int8_rowwise": lambda s: ((s.x, rotation, seed) for rotation in (0, _ROTATION) for seed in (0, 1)),
    "quantize_int8_tensorwise": lambda s: ((s.x, scale, seed) for scale in (None, _one(s)) for seed in (0, 1)),
    "quantize_mxfp8": lambda s: ((s.x, pad) for pad in (False, True)),
    "quantize_nvfp4": lambda s: ((s.x, _one(s), 0.0, False, first) for first in (True, False)),
    "quantize_per_tensor_fp8": lambda s: ((s.x, _one(s), code) for code in _FP8),
    "quantize_svdquant_w4a4": _quantize_svdquant,
    "scaled_mm_mxfp8": _scaled_mm_mxfp8,
    "scaled_mm_nvfp4": _scaled_mm_nvfp4,
    "scaled_mm_svdquant_w4a4": _scaled_mm_svdquant,
    "stochastic_rounding_fp8": lambda s: ((s.x, s.empty(s.m, s.k, dtype=_U8), code) for code in _FP8),
}


@cache
def _parts(fmt: Format, layout: str, n: int, k: int, dtype: torch.dtype) -> Parts:
    """Parts without values, packed if a layout is named. Raises what packing raises."""
    plain = fmt.empty_parts((n, k), META, dtype)
    return plain if layout in ("", dispatch.ANY_LAYOUT) else get_layout(layout, fmt).pack(fmt, plain)


def _of_format(op: str, fmt: Format, layout: str, s: Sizes) -> Iterator[Arguments]:
    """The arguments of an op that works by a format; none for another op."""
    weight, indices = s.empty(s.n, s.k), s.empty(s.m, dtype=torch.int64)
    parts = dict(_parts(fmt, layout, s.n, s.k, s.dtype))
    if op == "linear":
        yield fmt, s.x, parts, s.bias
        yield fmt, s.x, parts, None
    elif op == "linear_input_gradient":
        yield fmt, s.empty(s.m, s.n), parts, s.k
    elif op == "dequantize":
        yield fmt, parts, (s.n, s.k), s.dtype
    elif op == "embedding":
        yield fmt, indices, parts, s.k, s.dtype
    elif op == "quantize":
        yield fmt, weight, None, "weight"
        yield fmt, weight, 1, "weight"
    elif op == "scale_search":
        yield fmt, weight, None, "weight"
    elif op == "row_errors":
        yield fmt, parts, weight


def specs(format: str) -> list[str]:
    """The specs of a format, or of all for an entry that serves all."""
    every = dict.fromkeys((*ALL_SPECS, *MORE_SPECS))
    return [one for one in every if format == dispatch.ANY_FORMAT or parse_spec(one).name == format]


def examples(entry: Kernel, sizes: Sizes) -> Iterator[tuple[str, Arguments]]:
    """(what it is, arguments) of calls of an entry. Nothing where this file has none for its op."""
    if entry.op in NAMED:
        for arguments in NAMED[entry.op](sizes):
            yield entry.op, arguments
        return
    for spec in specs(entry.format):
        fmt = parse_spec(spec).plain
        if fmt.check_shape(sizes.n, sizes.k) is not None:
            continue
        try:
            for arguments in _of_format(entry.op, fmt, entry.layout, sizes):
                yield spec, arguments
        except LowbitError:  # a layout that this variant of the format does not have
            continue


def title(entry: Kernel) -> str:
    """`op format@layout`, as a test's name says it."""
    layout = "" if entry.layout in ("", dispatch.ANY_LAYOUT) else f"@{entry.layout}"
    return entry.op if entry.op in NAMED else f"{entry.op} {entry.format}{layout}"


def entries() -> list[Kernel]:
    """Everything that is registered for the backend triton."""
    if (why := dispatch.load("triton")) is not None:
        raise RuntimeError(f"the triton backend is not there: {why}")
    return [entry for entry in dispatch.table() if entry.backend == "triton"]


@dataclass(frozen=True)
class Noted:
    """A recorded launch, what launched it, and whether a forward runs it."""

    launch: Launch
    by: str
    what: str
    hot: bool

    @property
    def kernel(self) -> TunedKernel:
        """The kernel."""
        return self.launch.kernel

    @property
    def variant(self) -> tuple[Any, ...]:
        """What of the arguments the compiler sees: launches that are alike here are compiled once."""
        found = []
        for parameter in self.kernel.function.params:
            value = self.launch.arguments.get(parameter.name)
            if isinstance(value, Tensor):
                value = value.dtype
            elif not parameter.is_constexpr and isinstance(value, int):
                wide = not -(1 << 31) <= value < 1 << 31
                value = (wide, None if parameter.do_not_specialize else (value == 1, value % 16 == 0))
            found.append((parameter.name, str(getattr(value, "value", value))))
        return (id(self.kernel), *found)


class MissingExampleError(Exception):
    """An entry that was launched by nothing, with the reasons."""


def noted(entry: Kernel, target: Target, *, tokens: Sequence[int] = TOKENS, dtypes=DTYPES) -> list[Noted]:
    """The launches of an entry on a target, each variant once. Raises `MissingExampleError` when there is none."""
    found: dict[tuple[Any, ...], Noted] = {}
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
                for launch in launches:
                    one = Noted(launch, title(entry), what, entry.op not in COLD)
                    found.setdefault(one.variant, one)
    if not found:
        said = "; ".join(f"{what}: {why}" for what, why in refusals.items()) or "it launches nothing"
        why = said if tried else "tests/support/triton_launches.py has no example arguments for this op"
        raise MissingExampleError(f"{title(entry)} ({entry.name}) is not compiled: {why}")
    return list(found.values())


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
    once: dict[tuple[Any, ...], Noted] = {}
    for one in (one for many in found.values() for one in many):
        known = once.setdefault(one.variant, one)
        if one.hot and not known.hot:
            once[one.variant] = one
    return list(once.values())


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


def judge(one: Noted, config: Config, target: str) -> Verdict:
    """Compile and judge. The first config has to be good: it runs where nothing can be timed."""
    first = config == one.launch.configs[0]
    try:
        made = compile_launch(one.launch, config, TARGETS[target])
    except Exception as error:  # noqa: BLE001  (Triton raises many kinds; the text tells)
        text = f"does not compile: {type(error).__name__}: {str(error).strip()[:500]}"
        return Verdict(None, fault=text)
    if not _STORES.search(made.assembly):
        return Verdict(made, fault="nothing is left of the kernel: it stores nothing (the compiler made it a trap)")
    if made.shared > SHARED[target]:
        text = f"needs {made.shared} bytes of shared memory, {target} has {SHARED[target]}"
        return Verdict(made, fault=text) if first else Verdict(made, note=f"passed over: {text}")
    if made.spills and one.hot:
        text = f"spills {made.spills} bytes a thread"
        return Verdict(made, fault=text) if first else Verdict(made, note=text)
    return Verdict(made)
