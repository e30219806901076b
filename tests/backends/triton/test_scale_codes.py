from __future__ import annotations

import numpy as np
import pytest

from tests.support import ptx

ml_dtypes = pytest.importorskip("ml_dtypes")

scale_codes = pytest.importorskip(
    "lowbit.backends.triton.scale_codes", reason="Triton is not installed", exc_type=ImportError
)

CODES = np.arange(256, dtype=np.uint8)


def _run(program: str, kind) -> np.ndarray:
    """What a program makes of every code, beside each of three others, as float64 [256, 4]."""
    four = np.stack([CODES, CODES[::-1], np.roll(CODES, 77), np.roll(CODES, 130)], axis=1)
    found = ptx.run(program, {2: np.ascontiguousarray(four).view(np.uint32)[:, 0]})
    lanes = np.stack([found[0], found[1]], axis=1).view(np.uint16).view(kind).astype(np.float64)
    order = [np.argsort(four[:, one]) for one in range(4)]
    return np.stack([lanes[order[one], one] for one in range(4)], axis=1)


@pytest.mark.parametrize(("name", "kind", "raised"), [("BF16", ml_dtypes.bfloat16, 119), ("FP16", np.float16, 7)])
def test_e4m3(name, kind, raised):
    """Every code in every byte gives its value times the power of two exactly, its sign, or NaN."""
    wanted = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**raised
    assert raised == getattr(scale_codes, f"E4M3_{name}_RAISED")
    found = _run(getattr(scale_codes, f"E4M3_{name}"), kind)
    assert np.isnan(wanted).sum() == 2
    for lane in range(4):
        np.testing.assert_array_equal(found[:, lane], wanted)
        number = ~np.isnan(wanted)
        assert np.array_equal(np.signbit(found[number, lane]), np.signbit(wanted[number]))


def test_e8m0():
    """Every code in every byte gives its power of two, the smallest included, or NaN."""
    wanted = CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    found = _run(scale_codes.E8M0_BF16, ml_dtypes.bfloat16)
    for lane in range(4):
        np.testing.assert_array_equal(found[:, lane], wanted)
