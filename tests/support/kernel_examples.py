"""Example arguments, on the meta device, for every kernel in the dispatch table: what its launches are recorded with.

Entries that work by a format are tried with every spec of it that has a golden number; ops with a name of their own
have their arguments in `NAMED`. An op that this table does not know has no examples, which is an error where kernels
are compiled: nothing escapes the compiler by being forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit import dispatch
from lowbit.dispatch import Kernel
from lowbit.errors import LowbitError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.layouts.base import get_layout
from lowbit.layouts.scale_128x4 import swizzled_shape
from tests.support.specs import ALL_SPECS, READ_ONLY_SPECS

META = torch.device("meta")
T = TypeVar("T")
MORE_SPECS = (
    "fp8_e4m3(granularity=row)", "fp8_e5m2(granularity=row)", "int8(granularity=row)", "int8(granularity=tensor)",
    "int8(granularity=block)", "int8(rotation=256)", "wna16(group_size=64,zero_point=true)", "wna16(bits=8)",
    "svdquant_w4a4(act_unsigned=True)", "nvfp4(row_global_scale=True)",
    "awq_w4a16(group_size=256)", "wna16(group_size=0,zero_point=true)",
    *READ_ONLY_SPECS, "w4a8_codebook(correction=true)", "w4a8_codebook(codebook=false,group_size=8)",
)  # fmt: skip
# Ops that a forward never runs: what they cost in registers is of no interest, only that they compile.
COLD = (
    "pack",
    "unpack",
    "row_errors",
    "scale_search",
    "gptq_columns",
    "descent_columns",
    "refit_unit",
    "gptq_sweep",
    "descent_sweep",
    "add_second_moment",
    "add_column_ranges",
    "rounding_passes",
    "input_noise",
    "lost_to_lowest",
    "searched_scales",
)


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
_W4A8_GROUPS = (32, 64, 16, 8)
_F32, _I8, _U8 = torch.float32, torch.int8, torch.uint8
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _awq(s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    scale = s.empty(s.k // _GROUP, s.n)
    return s.empty(s.n, s.k // 2, dtype=_I8), scale, torch.empty_like(scale)


def _coalesced(s: Sizes, group: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = s.empty(s.n, s.k // group)
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
    "int4_plain_mm": lambda s: ((s.x, *_coalesced(s, group), s.bias, group) for group in _W4A8_GROUPS),
    "int4_plain_mm_input_gradient": lambda s: iter([(s.empty(s.m, s.n), *_coalesced(s, _GROUP), _GROUP)]),
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
    if layout in ("", dispatch.ANY_LAYOUT):
        return fmt.empty_parts((n, k), META, dtype)
    return get_layout(layout, fmt).empty_parts(fmt, (n, k), META, dtype)


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


def spread(found: Sequence[T], count: int, name: Callable[[T], str]) -> list[T]:
    """Of each name at most so many, the first and the last among them; 0 for all."""
    by: dict[str, list[T]] = {}
    for one in found:
        by.setdefault(name(one), []).append(one)
    if not count:
        return list(found)
    chosen = []
    for many in by.values():
        last = len(many) - 1
        places = dict.fromkeys(round(index * last / max(1, count - 1)) for index in range(count))
        chosen += [many[place] for place in places]
    return chosen
