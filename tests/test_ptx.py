"""The emulator of PTX computes what NVIDIA's manual says: other tests believe it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.support import ptx

F16, BF16 = (16, 10), (16, 7)


def _one(instruction: str, *values: int) -> int:
    found = ptx.run(f"{instruction};", {n + 1: np.array([v], np.uint32) for n, v in enumerate(values)})
    return int(found[0][0])


@pytest.mark.parametrize(
    ("instruction", "values", "wanted"),
    [
        ("shl.b32 $0, $1, 33", (5,), 0),
        ("shr.u32 $0, $1, 28", (0xF0000000,), 0xF),
        ("shr.s32 $0, $1, 28", (0xF0000000,), 0xFFFFFFFF),
        ("prmt.b32 $0, $1, $2, 0x5410", (0x33221100, 0x77665544), 0x55441100),
        ("prmt.b32 $0, $1, $2, 0x7632", (0x33221100, 0x77665544), 0x77663322),
        ("prmt.b32 $0, $1, $2, 0x98BF", (0x80018001, 0x7F000000), 0xFF00FF00),
        ("lop3.b32 $0, $1, 0xFF00FF00, 0x12345678, 0xEA", (0xF0F0F0F0,), 0xF234F678),
        ("lop3.b32 $0, $1, $2, $3, 0x96", (0xA, 0xC, 0xF), 0xA ^ 0xC ^ 0xF),
        ("bfe.u32 $0, $1, 8, 4", (0xABCDEF12,), 0xF),
        ("bfe.s32 $0, $1, 8, 4", (0xABCDEF12,), 0xFFFFFFFF),
        ("bfi.b32 $0, $1, $2, 8, 4", (0x3, 0xFFFFFFFF), 0xFFFFF3FF),
        ("mad.lo.s32 $0, $1, $2, 7", (0xFFFFFFFF, 5), 2),
        ("dp4a.s32.s32 $0, $1, $2, $3", (0x80FF0102, 0x7F030405, 10), (-128 * 127 - 3 + 4 + 10 + 10) & 0xFFFFFFFF),
        ("mov.b32 $0, {$1, $2}", (0xAAAA1234, 0x5678), 0x56781234),
        ("cvt.rn.bf16x2.f32 $0, $1, $2", (0x3F808000, 0x40000001), 0x3F804000),
        ("cvt.rn.f16x2.e4m3x2 $0, $1", (0x01FE,), 0x1800DF00),
        ("fma.rn.f32 $0, $1, $2, 0f80000000", (0x80000000, 0x3F800000), 0x80000000),
        ("mul.rn.bf16x2 $0, $1, $2", (0x7F807F80, 0x00003F80), 0x7FFF7F80),
        ("mul.rn.f16x2 $0, $1, $2", (0x7BFF0001, 0x40003800), 0x7C000000),
    ],
)  # fmt: skip
def test_by_hand(instruction, values, wanted):
    """Each instruction gives what was worked out by hand, its edges included."""
    assert _one(instruction, *values) == wanted


def _value(bits: int, kind) -> Fraction:
    exponent, mantissa = (bits & 0x7FFF) >> kind[1], bits & ((1 << kind[1]) - 1)
    bias = 2 ** (14 - kind[1]) - 1
    low = Fraction(mantissa, 1 << kind[1]) + (exponent > 0)
    return (-1) ** (bits >> 15) * low * Fraction(2) ** (max(exponent, 1) - bias)


@pytest.mark.parametrize(("name", "kind"), [("f16x2", F16), ("bf16x2", BF16)])
def test_fma_rounds_once(name, kind):
    """A fused product and sum lies as near to the exact one as its neighbours, and is even where two are as near."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(0, 1 << 16, 3000, dtype=np.uint32) for _ in range(3))
    half = 1 << kind[1]
    one = (2 ** (14 - kind[1]) - 1) << kind[1]
    a[:2], b[:2], c[:2] = one + 1, one + half // 2, [1, 0x8001]  # a * b is a tie, c a bit too small for float64 to see
    found = ptx.run(f"fma.rn.{name} $0, $1, $2, $3;", {1: a | a << 16, 2: b | b << 16, 3: c | c << 16})[0]
    assert (found & 0xFFFF == found >> 16).all()
    finite = 0
    largest = ((1 << 15) - 1) ^ half
    for i in range(len(a)):
        inputs = [int(v[i]) for v in (a, b, c)]
        got = int(found[i]) & 0xFFFF
        if any((bits & 0x7FFF) > largest for bits in inputs) or (got & 0x7FFF) > largest:
            continue
        exact = _value(inputs[0], kind) * _value(inputs[1], kind) + _value(inputs[2], kind)
        error = abs(_value(got, kind) - exact)
        for other in (got - 1, got + 1):
            if got & 0x7FFF and (other & 0x7FFF) <= largest:
                away = abs(_value(other & 0xFFFF, kind) - exact)
                assert error < away or (error == away and got % 2 == 0)
        finite += 1
    assert finite > 1000


def test_what_it_does_not_know_is_refused():
    """An unknown instruction, an undeclared register and one that is read too early do not pass in silence."""
    word = {1: np.array([1], np.uint32)}
    with pytest.raises(NotImplementedError, match="sin"):
        ptx.run("sin.approx.f32 $0, $1;", word)
    with pytest.raises(NotImplementedError, match="relu"):
        ptx.run("fma.rn.relu.f16x2 $0, $1, $1, $1;", word)
    with pytest.raises(KeyError, match="not declared"):
        ptx.run("mov.b32 t, $1;", word)
    with pytest.raises(KeyError, match="before it is written"):
        ptx.run("{ .reg .b32 t; mov.b32 $0, t; }", word)
