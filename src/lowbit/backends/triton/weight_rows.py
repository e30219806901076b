"""Rows of a weight decoded to 16 or 32 bits, some in a row or some by index: what dequantize and embedding launch.

    value = (code - zero) * scale + offset                  times a factor of the column, where there is one

All of it is float32 in the order of the format, every operation rounded on its own, and the result is cast once: the
bits are those of the reference. A thread decodes a unit, up to eight columns that lie in one word of codes and share a
scale, and writes it at once: 16 bytes of bfloat16 or float16. In words128 it reads eight words, side by side, that hold
eight such runs, 16 columns apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.floats import e4m3_value, e5m2_value, e8m0_value
from lowbit.backends.triton.tuning import Arguments, Config, config, tuned
from lowbit.errors import UnsupportedError
from lowbit.formats.awq_w4a16 import MIDDLE, AwqW4A16
from lowbit.formats.base import Format
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Dim, Parts
from lowbit.formats.wna16 import WNA16
from lowbit.layouts import words128

FORMATS = ("awq_w4a16", "wna16", "nvfp4", "mxfp4", "fp8_e4m3", "fp8_e5m2", "mxfp8", "int8")
UNSIGNED, SIGNED, E2M1, E4M3, E5M2 = (tl.constexpr(i) for i in range(5))  # what codes are
_CODES = {
    "awq_w4a16": UNSIGNED, "wna16": UNSIGNED, "nvfp4": E2M1, "mxfp4": E2M1, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2,
    "mxfp8": E4M3, "int8": SIGNED,
}  # fmt: skip
FLOAT, FLOAT8, POWER = (tl.constexpr(i) for i in range(3))  # what scales are
_ALONE, _TIMES, _OVER = (tl.constexpr(i) for i in range(3))  # what becomes of them and the global scale
_UNIT = 8  # columns that a thread decodes at a time
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_THREADS = 128
_AXIS = 32768
_MANY = 32  # programs for each processor from which one may do the work of several
_WASTE = 1.07
_MAGIC = tl.constexpr(8388608.0)  # 2**23: the mantissa of a float32 of this size counts in ones


@triton.jit
def _scale_value(stored, SCALE: tl.constexpr):
    if SCALE == FLOAT8:
        return e4m3_value(stored.to(tl.int32))
    if SCALE == POWER:
        return e8m0_value(stored.to(tl.int32))
    return stored.to(tl.float32)


@triton.jit
def _code_value(code, low, CODE: tl.constexpr):
    """int32 codes, and for unsigned ones 2**23 more than what stands for 0 -> float32, exact."""
    if CODE == E2M1:  # moved to where float32 has its exponent; 2**126 is the difference of the biases
        bits = ((code << 22) & 0x01C00000) | ((code << 28) & -0x80000000)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    if CODE == E4M3:
        bits = ((code << 20) & 0x07F00000) | ((code << 24) & -0x80000000)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        return tl.where((code & 127) == 127, float("nan"), value)
    if CODE == E5M2:
        return e5m2_value(code)
    if CODE == SIGNED:
        return ((code ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - (_MAGIC + 128.0)
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - low


@triton.jit
def _rounded_product(a, b, ASSEMBLE: tl.constexpr):
    """a * b as float32: a compiler may not join it with a sum that follows."""
    if ASSEMBLE:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a * b


@triton.jit
def _step(scale, zero, offset, shared, at, row, inside, LOW: tl.constexpr, SCALE: tl.constexpr, SHARED: tl.constexpr,
          ROW_SHARED: tl.constexpr):  # fmt: skip
    """Of each unit its scale, 2**23 more than its zero, and its offset: float32 in the shape of `at`."""
    step = _scale_value(tl.load(scale + at, mask=inside, other=0), SCALE)
    if SHARED != _ALONE:
        factor = tl.load(shared + row) if ROW_SHARED else tl.load(shared)
        step = step * factor if SHARED == _TIMES else tl.div_rn(step, tl.broadcast_to(factor, step.shape))
    low = tl.full(at.shape, _MAGIC + LOW, tl.float32)
    if zero is not None:
        low = tl.load(zero + at, mask=inside, other=0).to(tl.float32) + _MAGIC
    added = low
    if offset is not None:
        added = tl.load(offset + at, mask=inside, other=0).to(tl.float32)
    return step, low, added


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """All where every processor has several programs' worth of rows, else one step each."""
    most = 2 if arguments["WIDE"] else 4
    return [one for one in configs if one.constants["STEPS"] <= most] if arguments["LARGE"] else configs[:1]


@tuned(
    [config(STEPS=1, warps=4, stages=1), config(STEPS=2, warps=4, stages=1), config(STEPS=4, warps=4, stages=1)],
    key=("codes", "out", "indices", "units", "CODE", "BITS", "GROUP", "WIDE", "LARGE"),
    prune=_sensible,
)
@triton.jit(do_not_specialize=("first", "count", "n"))
def _decode_rows(
    codes, scale, zero, offset, shared, columns, indices, out, first, count, n, k, units, row_step, scale_row,
    scale_group, BITS: tl.constexpr, CODE: tl.constexpr, LOW: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    TALL: tl.constexpr, SHARED: tl.constexpr, ROW_SHARED: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    RAGGED: tl.constexpr, ASSEMBLE: tl.constexpr, LARGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    unit = (tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]
    lane = tl.arange(0, UNIT)[None, None, :]
    for step in tl.static_range(STEPS):
        to = (block.to(tl.int64) * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        present = to < count
        if indices is None:
            row = tl.where(present, first + to, 0)
            known = present
        else:
            row = tl.load(indices + to, mask=present, other=0).to(tl.int64)
            known = (row >= 0) & (row < n)
            row = tl.where(known, row, 0)
        row, to, present, known = row[:, None], to[:, None], present[:, None], known[:, None]
        inside = present & (unit < units)
        scale_at = (row // TALL) * scale_row
        code_at = row * row_step + unit
        if WIDE:  # units of eight words: column 16 j + i of a block is nibble j of word i
            words = tl.load(codes + (code_at * UNIT)[:, :, None] + lane, mask=inside[:, :, None], other=0)
        else:
            words = tl.load(codes + code_at, mask=inside, other=0)[:, :, None]
        for j in tl.static_range(8 if WIDE else 1):
            if WIDE:
                column = (unit // 2) * 128 + j * 16 + (unit % 2) * 8
                code = (words >> (4 * j)) & 15
            else:
                column = unit * UNIT
                code = (words >> (lane * BITS)).to(tl.int32) & ((1 << BITS) - 1)
            if j == 0 or (GROUP % 128 != 0 and (128 % GROUP != 0 or (16 * j) % GROUP == 0)):
                at = scale_at + (column // GROUP if GROUP else tl.zeros_like(column)).to(tl.int64) * scale_group
                factor, low, added = _step(scale, zero, offset, shared, at, row, inside, LOW, SCALE, SHARED, ROW_SHARED)
            value = _code_value(code, low[:, :, None], CODE)
            if offset is None:
                value = value * factor[:, :, None]
            else:
                value = _rounded_product(value, factor[:, :, None], ASSEMBLE) + added[:, :, None]
            writes = inside[:, :, None]
            if RAGGED:
                writes = writes & (column[:, :, None] + lane < k)
                put = (to * k + column)[:, :, None] + lane
            else:
                put = (to * (k // UNIT) + column // UNIT)[:, :, None] * UNIT + lane
            if columns is not None:
                value = value * tl.load(columns + column[:, :, None] + lane, mask=writes, other=0).to(tl.float32)
            if indices is not None:
                value = tl.where(known[:, :, None], value, float("nan"))
            tl.store(out + put, value.to(out.dtype.element_ty), mask=writes)


@dataclass(frozen=True)
class Coded:
    """A weight as the kernel takes it: the arguments that say where its parts lie and what they mean."""

    n: int
    k: int
    arguments: dict[str, Any] = field(repr=False)

    def decode(self, out: Tensor, start: int, stop: int) -> None:
        """Rows [start, stop) -> out [stop - start, K], contiguous."""
        self._launch(out, None, start, stop - start)

    def look_up(self, out: Tensor, indices: Tensor) -> None:
        """The rows that `indices` [...] name -> out [..., K], contiguous; NaN for one that names no row."""
        if self.n:
            self._launch(out, indices.contiguous(), 0, indices.numel())
        else:  # the kernel reads row 0 in the place of one that is not there
            out.fill_(float("nan"))

    def _launch(self, out: Tensor, indices: Tensor | None, first: int, count: int) -> None:
        if not count or not self.k:
            return
        units = self.arguments["units"]
        block_u = _across(units)
        block_r = min(_THREADS // block_u, triton.next_power_of_2(count))
        target = device.target_of(out.device)
        _decode_rows(
            lambda meta: (triton.cdiv(units, block_u), *_grid(triton.cdiv(count, block_r * meta["STEPS"]))),
            out.device, **self.arguments, indices=indices, out=out, first=first, count=count, n=self.n, k=self.k,
            ASSEMBLE=target.kind == "cuda", LARGE=units * count >= _MANY * _THREADS * target.processors,
            BLOCK_R=block_r, BLOCK_U=block_u,
        )  # fmt: skip


def _across(units: int) -> int:
    """How many units of a row a program decodes: a power of two of which few are wasted at the end of the row."""
    sizes = [size for size in (128, 64, 32, 16, 8, 4, 2, 1) if size < 2 * units]
    padded = {size: triton.cdiv(units, size) * size for size in sizes}
    return next(size for size in sizes if padded[size] <= _WASTE * units)


def _grid(blocks: int) -> tuple[int, int]:
    """Two axes of a grid that hold so many blocks or more: one alone ends at 65535."""
    return min(blocks, _AXIS), triton.cdiv(blocks, _AXIS)


def describe(fmt: Format, parts: Parts, k: int, layout: str) -> Coded:
    """A weight [N, k] in plain parts (layout "") or in words128, for which `refuses` returned None."""
    wide = layout == words128.NAME
    qdata, scale = parts["qdata"], parts["scale"]
    zero, offset = parts.get("zero_point"), parts.get("zero")
    other = zero if offset is None else offset
    if other is not None and other.stride() != scale.stride():
        scale, other = scale.contiguous(), other.contiguous()
        zero, offset = (other, None) if offset is None else (None, other)
    bits, group = _bits(fmt), _group(fmt)
    unit, codes = (_UNIT, qdata) if wide else _units(qdata, bits, group)
    tall, scale_row, scale_group = _steps(fmt, scale, wide=wide)
    shared = parts.get("global_scale")
    shared = None if shared is None else shared.contiguous()
    divides = getattr(fmt, "global_scale_divides", False)
    arguments = {
        "codes": codes, "row_step": codes.stride(0) // (_UNIT if wide else 1), "BITS": bits, "CODE": _CODES[fmt.name],
        "units": k // (_UNIT * _UNIT) if wide else triton.cdiv(k, unit), "UNIT": unit, "WIDE": wide,
        "RAGGED": k % unit != 0,
        "scale": _raw(scale), "scale_row": scale_row, "scale_group": scale_group, "TALL": tall, "GROUP": group,
        "SCALE": {torch.float8_e4m3fn: FLOAT8, torch.uint8: POWER}.get(scale.dtype, FLOAT),
        "zero": zero, "offset": offset, "LOW": float(MIDDLE if isinstance(fmt, AwqW4A16) else 1 << (bits - 1)),
        "shared": shared, "SHARED": _ALONE if shared is None else _OVER if divides else _TIMES,
        "ROW_SHARED": shared is not None and shared.dim() > 0,
        "columns": parts["pre_quant_scale"].contiguous() if fmt.pre_quant_scale else None,
    }  # fmt: skip
    return Coded(codes.shape[0], k, arguments)


def refuses(fmt: Format, parts: Parts, dtype: torch.dtype, layout: str = "") -> str | None:
    """Why the rows of a weight cannot be decoded here to a dtype, or None."""
    if fmt.name not in FORMATS:
        return f"{fmt.name} has a decoder of its own, or none"
    if isinstance(fmt, WNA16) and fmt.bits not in {2, 4, 8}:
        return f"codes of {fmt.bits} bits lie across bytes; the decoder takes 2, 4 and 8"
    if isinstance(fmt, WNA16) and fmt.act_order:
        return "columns whose groups are scattered (act_order); the decoder takes groups of neighbours"
    if isinstance(fmt, Int8) and fmt.rotation:
        return "the weight is rotated; the decoder does not turn it back"
    if dtype not in device.DTYPES:
        return f"the result is {str(dtype).removeprefix('torch.')}; the decoder gives float32, bfloat16 and float16"
    group, least = _group(fmt), _UNIT if layout else 8 // _bits(fmt)
    if group % least:
        why = f"which {layout} keeps side by side" if layout else "which share a byte"
        return f"groups of {group} columns; the decoder takes multiples of {least}, {why}"
    return device.refuses(torch.empty(0, dtype=dtype, device=parts["qdata"].device), **parts)


def _bits(fmt: Format) -> int:
    if isinstance(fmt, WNA16):
        return fmt.bits
    return 4 if fmt.name in {"awq_w4a16", "nvfp4", "mxfp4"} else 8


def _group(fmt: Format) -> int:
    """Columns that share a scale, 0 for all of a row."""
    dims = next(rule for rule in fmt.rules if rule.name == "scale").dims
    return next((dim.per for dim in dims if isinstance(dim, Dim) and dim.axis == "K"), 0)


def _steps(fmt: Format, scale: Tensor, *, wide: bool) -> tuple[int, int, int]:
    """Rows that share a scale, and the steps in memory from one row (of tiles) and from one group to the next."""
    rule = next(rule for rule in fmt.rules if rule.name == "scale")
    if rule.row_axis is None:
        return 1, 0, 0
    row_axis = 1 if wide else rule.row_axis
    return rule.rows_per_entry, scale.stride(row_axis), scale.stride(1 - row_axis)


def _units(qdata: Tensor, bits: int, group: int) -> tuple[int, Tensor]:
    """Columns of a unit, and the codes [N, ...] as words of one unit each: the largest that the memory allows."""
    raw = _raw(qdata if qdata.stride(1) == 1 else qdata.contiguous())
    for unit in (_UNIT, _UNIT // 2, _UNIT // 4, 1):
        size = unit * bits // 8
        if not size or group % unit:
            continue
        if raw.stride(0) % size == raw.shape[1] % size == raw.data_ptr() % size == 0:
            return unit, raw.view(_WORDS[size])
    raise UnsupportedError(f"groups of {group} columns with codes of {bits} bits: see `refuses`")


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dtype != torch.uint8 else tensor
