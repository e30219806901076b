"""w4a8_codebook decoded: to the int8 values that an integer product sees, and to the weight, turned back.

    v = clamp(round(level[code] * s_rel), -127, 127)        w = R (v * s_channel [+ correction])

A unit is 16 columns of a row: eight bytes of nibbles and, with 6 bits, four bytes of upper bits. For the weight the
regular Hadamard matrices of `rotate_rows` multiply in the tensor cores. Without a correction they multiply integers,
whose sums are exact in float32, so that the weight is rounded less often than the reference rounds it. Groups of 16
are turned four at a time: a NaN among them makes NaN of all 64 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, rotate_rows
from lowbit.backends.triton.floats import e4m3_value
from lowbit.backends.triton.tuning import Arguments, Config, config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook
from lowbit.numerics.int8_matmul import INT8_MAX

UNIT = tl.constexpr(16)  # columns
_COLUMNS = tl.constexpr(rotate_rows.COLUMNS)
_LARGEST = tl.constexpr(float(INT8_MAX))
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: its last bit is worth 1, so that adding to it rounds half to even
_ONES = tl.constexpr(8388608.0)  # 2**23: the mantissa of a float32 of this size counts in ones
_SPANS = {1: 64, 4: 16}  # rotated groups of a program, by how many tensors hold a group: more do not fit registers


@triton.jit
def _codes(raw, row, unit, inside, width, UNITS: tl.constexpr, BITS: tl.constexpr):
    """Codes of units of rows: int32 [UNITS, 16]; 0 outside. width: columns of a row."""
    LEAST: tl.constexpr = UNIT if BITS == 4 else 2 * UNIT  # columns of which a row has a multiple
    start = row.to(tl.int64) * (width // LEAST) * (LEAST * BITS // 8)
    byte = (start + unit * (UNIT // 2))[:, None] + tl.arange(0, UNIT // 2)[None, :]
    pair = tl.load(raw + byte, mask=inside[:, None], other=0).to(tl.int32)
    code = tl.reshape(tl.join(pair & 15, pair >> 4), (UNITS, UNIT))
    if BITS == 6:
        above = (start + width // LEAST * UNIT + unit * (UNIT // 4))[:, None] + tl.arange(0, UNIT // 4)[None, :]
        four = tl.load(raw + above, mask=inside[:, None], other=0).to(tl.int32)
        upper = (four[:, :, None] >> (2 * tl.arange(0, 4))[None, None, :]) & 3
        code |= tl.reshape(upper, (UNITS, UNIT)) << 4
    return code


@triton.jit
def _first_group(unit, GROUP: tl.constexpr):
    """The group of the first column of units."""
    return unit // (GROUP // UNIT) if GROUP >= UNIT else unit * (UNIT // GROUP)


@triton.jit
def _of_groups(values, first, step, inside, UNITS: tl.constexpr, GROUP: tl.constexpr, NAN: tl.constexpr = True):
    """What is stored by group, float32 [UNITS, 16]: at `first` for the first group of a unit, `step` on for the next.

    uint8 is e4m3. Not NAN: 0 in the place of NaN.
    """
    COUNT: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    at = first[:, None] + (tl.arange(0, COUNT) * step)[None, :]
    stored = tl.load(values + at, mask=inside[:, None], other=0)
    value = e4m3_value(stored.to(tl.int32)) if stored.dtype == tl.uint8 else stored.to(tl.float32)
    if not NAN:
        value = tl.where(value == value, value, 0.0)  # noqa: PLR0124  (false for NaN)
    return tl.reshape(tl.broadcast_to(value[:, :, None], (UNITS, COUNT, UNIT // COUNT)), (UNITS, UNIT))


@triton.jit
def _level(codebook, code, ASSEMBLE: tl.constexpr):
    """codebook[code], float32. A load of Triton's own would move codes to threads that read side by side, and back."""
    if ASSEMBLE:
        at = codebook.to(tl.int64) + code.to(tl.int64) * 4
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [at], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # not after it: Triton compiles what stands behind a return, too
        return tl.load(codebook + code)


@triton.jit
def _raised(
    raw, s_rel, codebook, row, unit, inside, width, UNITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ASSEMBLE: tl.constexpr, NAN: tl.constexpr = True,
):  # fmt: skip
    """Integers that codes stand for, plus `_NEAREST`: float32 [UNITS, 16]. row, unit of it, inside: [UNITS].

    A scale that is NaN gives NaN, or 0 where not NAN.
    """
    code = _codes(raw, row, unit, inside, width, UNITS, BITS)
    if codebook is None:
        level = (code | 0x4B000000).to(tl.float32, bitcast=True) - (_ONES + (1 << (BITS - 1)))
    else:
        level = _level(codebook, code, ASSEMBLE)
    first = row.to(tl.int64) * (width // GROUP) + _first_group(unit, GROUP)
    value = level * _of_groups(s_rel, first, 1, inside, UNITS, GROUP, NAN)
    value = tl.minimum(value, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(value, -_LARGEST, propagate_nan=tl.PropagateNan.ALL) + _NEAREST


@triton.jit
def integers(
    raw, s_rel, codebook, row, unit, inside, width, UNITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ASSEMBLE: tl.constexpr,
):  # fmt: skip
    """The same without `_NEAREST`, int8 [UNITS, 16]; a scale that is NaN gives 0.

    It is 0 from the beginning: which bits a GPU's NaN has, and so what the lowest eight are, is its own matter.
    """
    value = _raised(raw, s_rel, codebook, row, unit, inside, width, UNITS, BITS, GROUP, ASSEMBLE, False)
    return value.to(tl.int32, bitcast=True).to(tl.int8)


@tuned([config(BLOCK=128, warps=4, stages=1), config(BLOCK=256, warps=4, stages=1)], key=("BITS", "GROUP"))
@triton.jit
def _decode_integers(
    raw, s_rel, codebook, out, width, BITS: tl.constexpr, GROUP: tl.constexpr, ASSEMBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i decodes units from i * BLOCK on of a row of `width` columns; the next row follows."""
    units = width // UNIT
    tiles = tl.cdiv(units, BLOCK)
    row, left = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    unit = left + tl.arange(0, BLOCK)
    inside = unit < units
    value = integers(raw, s_rel, codebook, row, unit, inside, width, BLOCK, BITS, GROUP, ASSEMBLE)
    at = tl.arange(0, BLOCK)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    tl.store(out + (row * units + left) * UNIT + at, value, mask=inside[:, None])


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """More warps where a value is three in registers, as float32 is when it is turned."""
    return configs[1:] if arguments["CUTS"] else configs[:1]


@tuned([config(warps=4, stages=1), config(warps=8, stages=1)], key=("PIECES", "BITS", "CUTS"), prune=_sensible)
@triton.jit(do_not_specialize=("n",))
def _decode_rotated(
    raw, s_rel, codebook, s_channel, correction, columns, matrix, out, n, k, apart, BITS: tl.constexpr,
    GROUP: tl.constexpr, ASSEMBLE: tl.constexpr, CUTS: tl.constexpr, PIECES: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """A program turns SPANS spans of PIECES * 64 columns. apart: from a group to the next in `correction`."""
    SPAN: tl.constexpr = PIECES * _COLUMNS
    COUNT: tl.constexpr = _COLUMNS // UNIT  # units of a piece
    spans = tl.cdiv(k, SPAN)
    place = tl.arange(0, SPANS * COUNT)
    span = tl.program_id(0) * SPANS + place // COUNT
    row, left = span // spans, span % spans * (SPAN // UNIT) + place % COUNT
    square = tl.arange(0, _COLUMNS)
    hadamard = tl.load(matrix + square[:, None] * _COLUMNS + square[None, :])
    parts = ()
    for piece in tl.static_range(PIECES):
        unit = left + piece * COUNT
        inside = (row < n) & (unit < k // UNIT)
        raised = _raised(raw, s_rel, codebook, row, unit, inside, k, SPANS * COUNT, BITS, GROUP, ASSEMBLE)
        value = raised - _NEAREST
        if correction is not None:
            value *= tl.load(s_channel + row, mask=inside, other=0.0)[:, None]
            first = _first_group(unit, GROUP).to(tl.int64) * apart + row
            value += _of_groups(correction, first, apart, inside, SPANS * COUNT, GROUP)
        value = tl.reshape(value, (SPANS, _COLUMNS)).to(tl.float16 if correction is None else tl.float32)
        parts += (rotate_rows.rotate(value, hadamard, CUTS),)  # type: ignore[assignment]
    parts = rotate_rows.combine(parts)
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    row = span // spans
    for piece in tl.static_range(PIECES):
        column = (span % spans * SPAN + piece * _COLUMNS)[:, None] + tl.arange(0, _COLUMNS)[None, :]
        inside = (row < n)[:, None] & (column < k)
        value = parts[piece]
        if correction is None:
            value *= tl.load(s_channel + row, mask=row < n, other=0.0)[:, None]
        if columns is not None:
            value *= tl.load(columns + column, mask=inside, other=0).to(tl.float32)
        tl.store(out + (row.to(tl.int64) * k)[:, None] + column, value.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Coded:
    """A weight [n, k] as the kernels take it."""

    n: int
    k: int
    fmt: W4A8Codebook
    parts: Parts

    def decode(self, out: Tensor, start: int, stop: int) -> None:
        """Rows [start, stop) of the weight -> out [stop - start, K], contiguous, in its dtype."""
        count, correction = stop - start, self.parts.get("correction")
        if not count or not self.k:
            return
        pieces, target = rotate_rows.pieces(self.fmt.rotation), device.target_of(out.device)
        held = torch.float16 if correction is None else torch.float32
        correction = None if correction is None else correction[:, start:stop]
        columns = self.parts["pre_quant_scale"].contiguous() if self.fmt.pre_quant_scale else None
        spans = count * triton.cdiv(self.k, pieces * rotate_rows.COLUMNS)
        _decode_rotated(
            lambda _: (triton.cdiv(spans, _SPANS[pieces]),),
            out.device, **self.codes(start, stop), s_channel=self.parts["s_channel"][start:stop], correction=correction,
            columns=columns, matrix=rotate_rows.matrix(self.fmt.rotation, held, target, out.device), out=out, n=count,
            k=self.k, apart=0 if correction is None else correction.stride(0), CUTS=rotate_rows.cuts(held, target),
            PIECES=pieces, SPANS=_SPANS[pieces],
        )  # fmt: skip

    def decode_integers(self, out: Tensor, start: int, stop: int) -> None:
        """The int8 values of rows [start, stop) -> out int8 [stop - start, K], contiguous."""
        count, width = stop - start, self.k
        if not count or not width:
            return
        if self.fmt.bits == 4:  # rows follow each other without a seam
            count, width = 1, count * width
        _decode_integers(
            lambda meta: (count * triton.cdiv(width, meta["BLOCK"] * UNIT.value),),
            out.device, **self.codes(start, stop), out=out, width=width,
        )  # fmt: skip

    def codes(self, start: int, stop: int) -> dict[str, Any]:
        """The arguments that say where the codes of rows lie and what integers they stand for."""
        s_rel = self.parts["s_rel"][start:stop]
        return {
            "raw": self.parts["qdata"][start:stop].view(torch.uint8),
            "s_rel": s_rel.view(torch.uint8) if s_rel.dtype.itemsize == 1 else s_rel,
            "codebook": self.parts.get("codebook"), "BITS": self.fmt.bits, "GROUP": self.fmt.group_size,
            "ASSEMBLE": device.target_of(s_rel.device).assembles,
        }  # fmt: skip


def describe(fmt: W4A8Codebook, parts: Parts, k: int) -> Coded:
    """A weight [N, k] for which `refuses` returned None."""
    return Coded(parts["qdata"].shape[0], k, fmt, parts)


def refuses(fmt: W4A8Codebook, parts: Parts, dtype: torch.dtype) -> str | None:
    """Why a weight cannot be turned back here, and rounded to a dtype, or None."""
    if rotate_rows.pieces(fmt.rotation) not in _SPANS:
        return f"groups of {fmt.rotation} columns are rotated; the decoder turns those of 16, 64 and 256 back"
    if dtype not in device.DTYPES:
        return f"the result is {str(dtype).removeprefix('torch.')}; the decoder gives float32, bfloat16 and float16"
    target = device.target_of(parts["qdata"].device)
    if target.kind == "cuda" and not target.assembles:
        return "the weight is rotated, for which Triton uses no tensor cores on this GPU"
    return refuses_integers(parts) or device.refuses(torch.empty(0, dtype=dtype, device=parts["qdata"].device), **parts)


def refuses_integers(parts: Parts) -> str | None:
    """Why codes cannot be read, or None."""
    for name in ("qdata", "s_rel", "s_channel", "codebook", "correction"):
        if name in parts and not parts[name].is_contiguous():
            return f"{name} has gaps between its elements; call contiguous() once, at load"
    return None


def refuses_dequantize(fmt: W4A8Codebook, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses(fmt, parts, dtype)


# The reference adds the rotation up in another order; a value between two of 16 bits may then be rounded to the other.
@kernel("dequantize", format="w4a8_codebook", backend="triton", refuses=refuses_dequantize, tolerance=1e-4)
def dequantize(fmt: W4A8Codebook, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=parts["qdata"].device)
    describe(fmt, parts, shape[1]).decode(out, 0, shape[0])
    return out


def refuses_gradient(fmt: W4A8Codebook, grad: Tensor, parts: Parts, k: int) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses(grad, **parts) or refuses(fmt, parts, grad.dtype)


@kernel("linear_input_gradient", format="w4a8_codebook", backend="triton", refuses=refuses_gradient, tolerance=6e-3)
def linear_input_gradient(fmt: W4A8Codebook, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad."""
    return decoded_linear.gradient_of(describe(fmt, parts, k), grad)
