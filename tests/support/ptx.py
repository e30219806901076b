"""The PTX of inline assembly, run on the CPU: what the text of a kernel computes for every code, without a GPU.

`run` knows the instructions on bits, integers and floats of 16 and 32 bits that decoding is made of, and raises
`NotImplementedError` for any other. Floats are computed with one rounding, to nearest even, and keep their subnormal
numbers, as the instructions without `.ftz` do (PTX ISA 8.5, chapter 9.7). A NaN comes out as the canonical one.

>>> found = run("{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0xF; }", {1: np.array([0x30], np.uint32)})
>>> int(found[0][0])
3
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint32]
Reals = NDArray[np.float64]


def run(asm: str, inputs: Mapping[int, NDArray]) -> dict[int, Bits]:
    """Run a program once for each element: `inputs` has the bits of its operands by number, uint32 arrays of one shape.

    Returns the bits of every `$n` that it wrote. A register that is read before it is written, or was never declared,
    raises `KeyError`.
    """
    names = {f"${number}": np.ascontiguousarray(array).view(np.uint32) for number, array in inputs.items()}
    registers: dict[str, Bits] = dict(names)
    shape = next(iter(names.values())).shape
    declared: set[str] = set()
    written: set[str] = set()
    for line in _statements(asm):
        if line.startswith(".reg"):
            kinds, *first = line.removeprefix(".reg").split(None, 1)
            assert kinds in (".b32", ".b16", ".u32", ".s32", ".f32", ".u16", ".s16"), line
            declared |= {name.strip() for name in first[0].split(",")}
            continue
        opcode, _, rest = line.partition(" ")
        operands = [one.strip() for one in re.split(r",(?![^{]*})", rest)]
        targets = _pieces(operands[0])
        for name in targets:
            if not name.startswith("$") and name not in declared:
                raise KeyError(f"{name} is not declared: {line}")
        values = [_value(one, registers, shape) for one in operands[1:]]
        found = _execute(opcode, values, len(targets) > 1)
        for name, value in zip(targets, found, strict=True):
            registers[name] = np.broadcast_to(value, shape).astype(np.uint32)
            written.add(name)
    return {int(name[1:]): registers[name] for name in sorted(written) if name.startswith("$")}


def _statements(asm: str) -> list[str]:
    text = re.sub(r"//[^\n]*", "", asm).strip()
    if text.startswith("{"):
        text = text[1 : text.rindex("}")]
    return [" ".join(part.split()) for part in text.split(";") if part.strip()]


def _pieces(operand: str) -> list[str]:
    return [one.strip() for one in operand.strip("{}").split(",")]


def _value(operand: str, registers: Mapping[str, Bits], shape: tuple[int, ...]) -> Bits:
    """The bits of an operand: a register, a number, or {low, high} of 16 bits each."""
    if operand.startswith("{"):
        low, high = (_value(one, registers, shape) for one in _pieces(operand))
        return (low & np.uint32(0xFFFF)) | (high << np.uint32(16))
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
        return np.full(shape, int("0x" + operand[2:], 0), np.uint32)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
        return np.full(shape, int(operand.rstrip("U"), 0) & 0xFFFFFFFF, np.uint32)
    if operand not in registers:
        raise KeyError(f"{operand} is read before it is written")
    return registers[operand]


def _execute(opcode: str, values: list[Bits], parts: bool) -> list[Bits]:
    name, *kinds = opcode.split(".")
    if name == "mov":
        (value,) = values
        return [value & np.uint32(0xFFFF), value >> np.uint32(16)] if parts else [value]
    if parts:
        raise NotImplementedError(f"{opcode} into {{low, high}}")
    if kinds[-1] in _FLOATS and name in _ON_REALS:
        if set(kinds[:-1]) - {"rn"}:
            raise NotImplementedError(opcode)
        return [_FLOATS[kinds[-1]].each(_ON_REALS[name], values)]
    found = _ON_BITS.get(opcode) or _ON_BITS.get(f"{name}.{_any_sign(kinds)}")
    if found is None:
        raise NotImplementedError(opcode)
    return [np.asarray(found(*values)).astype(np.uint32)]


def _any_sign(kinds: list[str]) -> str:
    """For what is the same bits signed or not."""
    return ".".join("b" + kind[1:] if kind in ("u32", "s32") else kind for kind in kinds)


# ---- bits and integers ----------------------------------------------------------------------------------------------


def _shift_left(x: Bits, by: Bits) -> Bits:
    return np.where(by > 31, 0, x.astype(np.uint64) << np.minimum(by, 32).astype(np.uint64)).astype(np.uint32)


def _shift_right(x: Bits, by: Bits) -> Bits:
    return (x.astype(np.uint64) >> np.minimum(by, 32).astype(np.uint64)).astype(np.uint32)


def _shift_signed(x: Bits, by: Bits) -> Bits:
    return (x.view(np.int32).astype(np.int64) >> np.minimum(by, 32).astype(np.int64)).astype(np.uint32)


def _permute(a: Bits, b: Bits, selector: Bits) -> Bits:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for byte in range(4):
        pick = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        found = (both >> (8 * (pick & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(found & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(pick & np.uint32(8), sign, found) << np.uint32(8 * byte)
    return out


def _lop3(a: Bits, b: Bits, c: Bits, table: Bits) -> Bits:
    out = np.zeros_like(a)
    for row in range(8):
        chosen = np.full_like(a, 0xFFFFFFFF)
        for at, operand in ((2, a), (1, b), (0, c)):
            chosen &= operand if row >> at & 1 else ~operand
        out |= np.where((table >> np.uint32(row)) & np.uint32(1), chosen, np.uint32(0))
    return out


def _field(x: Bits, start: Bits, length: Bits) -> Bits:
    return _shift_right(x, start) & (_shift_left(np.ones_like(x), length) - np.uint32(1))


def _field_signed(x: Bits, start: Bits, length: Bits) -> Bits:
    up = np.uint32(32) - length
    return _shift_signed(_shift_left(_field(x, start, length), up), up)


def _insert(x: Bits, into: Bits, start: Bits, length: Bits) -> Bits:
    mask = _shift_left(_shift_left(np.ones_like(x), length) - np.uint32(1), start)
    return (into & ~mask) | (_shift_left(x, start) & mask)


def _dot4(a: Bits, b: Bits, c: Bits) -> Bits:
    left, right = (np.ascontiguousarray(one).view(np.int8).reshape(*one.shape, 4).astype(np.int64) for one in (a, b))
    return ((left * right).sum(-1) + c.view(np.int32)).astype(np.uint32)


def _wide(operation: Callable[..., NDArray]) -> Callable[..., Bits]:
    def low(*values: Bits) -> Bits:
        return (operation(*(value.astype(np.uint64) for value in values)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return low


# ---- floats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Float:
    """A float of `width` bits, `mantissa` of them stored, and `lanes` of it in a register."""

    width: int
    mantissa: int
    lowest: int
    """The exponent of the smallest normal number."""
    highest: float
    lanes: int = 1

    def read(self, bits: Bits) -> Reals:
        if self.width == 32:
            return bits.view(np.float32).astype(np.float64)
        if self.mantissa == 7:
            return (bits << np.uint32(16)).view(np.float32).astype(np.float64)
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)

    def write(self, x: Reals) -> Bits:
        """Round once, half to even."""
        with np.errstate(all="ignore"):
            exponent = np.maximum(np.frexp(x)[1] - 1, self.lowest)
            quantum = np.ldexp(1.0, exponent - self.mantissa)
            rounded = np.where(np.isfinite(x), np.rint(x / quantum) * quantum, x)
            rounded = np.where(np.abs(rounded) > self.highest, np.copysign(np.inf, rounded), rounded)
            if self.width == 32 or self.mantissa == 7:
                bits = rounded.astype(np.float32).view(np.uint32) >> np.uint32(32 - self.width)
            else:
                bits = rounded.astype(np.float16).view(np.uint16).astype(np.uint32)
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF >> (32 - self.width)), bits).astype(np.uint32)

    def each(self, operation: Callable[..., Reals], values: list[Bits]) -> Bits:
        out = np.zeros_like(values[0])
        mask = np.uint32((1 << self.width) - 1)
        for lane in range(self.lanes):
            shift = np.uint32(lane * self.width)
            with np.errstate(all="ignore"):
                out |= self.write(operation(*(self.read((value >> shift) & mask) for value in values))) << shift
        return out


_F16 = _Float(16, 10, -14, 65504.0)
_BF16 = _Float(16, 7, -126, float.fromhex("0x1.FEp127"))
_F32 = _Float(32, 23, -126, float.fromhex("0x1.FFFFFEp127"))
_FLOATS = {
    "f16": _F16, "bf16": _BF16, "f32": _F32,
    "f16x2": _Float(16, 10, -14, _F16.highest, 2), "bf16x2": _Float(16, 7, -126, _BF16.highest, 2),
}  # fmt: skip


def _sum(a: Reals, b: Reals) -> Reals:
    """a + b, where inexact with its last bit set (round to odd): a second, narrower rounding is then the only one."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    even = (np.ascontiguousarray(total).view(np.uint64) & np.uint64(1)) == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & np.isfinite(error) & even & np.isfinite(total), nudged, total)


_ON_REALS: dict[str, Callable[..., Reals]] = {
    "fma": lambda a, b, c: _sum(a * b, c),  # the product of two floats of 32 bits is exact in 64
    "add": _sum,
    "sub": lambda a, b: _sum(a, -b),
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
}


def _packed(kind: _Float) -> Callable[[Bits, Bits], Bits]:
    return lambda high, low: (kind.write(_F32.read(high)) << np.uint32(16)) | kind.write(_F32.read(low))


def _e4m3_pair(kind: _Float) -> Callable[[Bits], Bits]:
    def widen(pair: Bits) -> Bits:
        codes = np.stack([pair & np.uint32(0xFF), (pair >> np.uint32(8)) & np.uint32(0xFF)])
        exponent, mantissa = (codes >> np.uint32(3)) & np.uint32(15), (codes & np.uint32(7)).astype(np.float64)
        value = np.where(exponent == 0, mantissa / 512, np.ldexp(1 + mantissa / 8, exponent.astype(np.int64) - 7))
        value = np.where((codes & np.uint32(127)) == 127, np.nan, value)
        low, high = kind.write(np.where(codes > 127, -value, value))
        return low | (high << np.uint32(16))

    return widen


_ON_BITS: dict[str, Callable[..., Bits]] = {
    "shl.b32": _shift_left, "shr.u32": _shift_right, "shr.b32": _shift_right, "shr.s32": _shift_signed,
    "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor, "not.b32": np.bitwise_not,
    "lop3.b32": _lop3, "prmt.b32": _permute, "bfe.u32": _field, "bfe.s32": _field_signed, "bfi.b32": _insert,
    "add.b32": _wide(np.add), "sub.b32": _wide(np.subtract), "mul.lo.b32": _wide(np.multiply),
    "mad.lo.b32": _wide(lambda a, b, c: a * b + c), "dp4a.s32.s32": _dot4,
    "min.u32": np.minimum, "max.u32": np.maximum,
    "min.s32": lambda a, b: np.minimum(a.view(np.int32), b.view(np.int32)),
    "max.s32": lambda a, b: np.maximum(a.view(np.int32), b.view(np.int32)),
    "cvt.f32.f16": lambda a: _F32.write(_F16.read(a)), "cvt.f32.bf16": lambda a: _F32.write(_BF16.read(a)),
    "cvt.rn.f16.f32": lambda a: _F16.write(_F32.read(a)), "cvt.rn.bf16.f32": lambda a: _BF16.write(_F32.read(a)),
    "cvt.rn.f16x2.f32": _packed(_F16), "cvt.rn.bf16x2.f32": _packed(_BF16),
    "cvt.rn.f32.s32": lambda a: _F32.write(a.view(np.int32).astype(np.float64)),
    "cvt.rn.f32.u32": lambda a: _F32.write(a.astype(np.float64)),
    "cvt.rni.s32.f32": lambda a: np.clip(np.rint(np.nan_to_num(_F32.read(a))), -(2**31), 2**31 - 1).astype(np.int64),
    "cvt.rn.f16x2.e4m3x2": _e4m3_pair(_F16),
}  # fmt: skip
