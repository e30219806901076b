from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.layouts import rows16
from tests.support.cpu_linear import (
    DTYPES,
    TOKENS,
    activations,
    check_linear,
    check_properties,
    packed_weight,
    relative_error,
)

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

UNROTATED = ("convrot_w4a4(rotation=0)", "convrot_w4a4(rotation=0,linear_dtype=int8)")
ROTATED = ("convrot_w4a4(rotation=16)", "convrot_w4a4", "convrot_w4a4(rotation=64,linear_dtype=int8)")


def both(spec, n, k, x, bias=None):
    """What the native kernel and what eager give."""
    packed, _ = packed_weight(spec, n, k, rows16.NAME)
    with use_backend("cpu"), torch.inference_mode():
        found = torch.nn.functional.linear(x, packed, bias)
    return found, parse_spec(spec).linear(x, packed.in_layout("").parts, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", UNROTATED)
def test_without_a_rotation_the_bits_are_eagers(spec, dtype):
    """Odd numbers of rows, columns and tokens, with a bias and without one: the same codes, sums and roundings."""
    for m, n, k in [(3, n, k) for n, k in ((1, 8), (15, 24), (16, 264), (17, 520), (100, 1000))] + [
        (m, 35, 72) for m in TOKENS
    ]:
        bias = torch.randn(n).to(dtype) if m % 2 else None
        found, wanted = both(spec, n, k, activations(m, k, dtype), bias)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), (n, k, m)


def test_the_largest_sums_are_exact():
    """All codes and all activations at their ends: nothing overflows on the way to an int32."""
    for spec, k in ((UNROTATED[0], 4096), (UNROTATED[1], 4096)):
        packed, _ = packed_weight(spec, 16, k, rows16.NAME)
        for code in (0x77, -0x78):  # 7 and -8 in every nibble
            parts = {**packed.in_layout("").parts, "scale": torch.ones(16)}
            parts["qdata"] = torch.full_like(parts["qdata"], code)
            x = torch.ones(2, k)
            x[1] = -1
            fmt = parse_spec(spec)
            packed_parts = rows16.pack(fmt, parts)
            entry = select("linear", fmt.name, rows16.NAME, "cpu", (fmt, x, packed_parts, None))
            assert entry.backend == "cpu"
            assert torch.equal(entry.run(fmt, x, packed_parts, None), fmt.linear(x, parts, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ROTATED)
def test_rotated(spec, dtype):
    """The product is eager's but for single codes of activations that lie between two."""
    size = max(parse_spec(spec).rotation, 64)
    for m, n, k in ((1, 1, size), (2, 17, 3 * size), (5, 33, size), (9, 100, 2 * size), (63, 16, size)):
        found, wanted = both(spec, n, k, activations(m, k, dtype), torch.randn(n).to(dtype))
        assert relative_error(found, wanted.double()) < 3e-3, (n, k, m)


def test_few_codes_of_rotated_rows_differ():
    """Rotating by sums and differences changes no more than one result in fifty, by the rounding of a single code."""
    found, wanted = both("convrot_w4a4", 64, 512, activations(64, 512, torch.float32))
    rows = ((found - wanted).abs() > 1e-5 * wanted.abs().amax()).any(dim=1)
    assert rows.sum() <= 2


def test_properties():
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties("convrot_w4a4(rotation=64)", 100, 192)
    check_properties("convrot_w4a4(rotation=0,linear_dtype=int8)", 16, 40)


def test_dequantized_weight():
    """With activations that int8 holds exactly, the product is that of the dequantized weight."""
    spec = UNROTATED[1]
    check_linear(spec, 35, 128, 4, torch.float32, reference=lambda x, w: _as_int8(x) @ w.t())


def _as_int8(x):
    scale = x.double().abs().amax(dim=1, keepdim=True) / 127
    return (x.double() / scale).round() * scale
