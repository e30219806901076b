from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, select, use_backend
from lowbit.formats import parse_spec
from tests.support.cpu_linear import activations, packed_weight, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, check_properties, require

require()

linear_convrot_w4a4 = pytest.importorskip("lowbit.backends.triton.linear_convrot_w4a4")
UNROTATED = ("convrot_w4a4(rotation=0)", "convrot_w4a4(rotation=0,linear_dtype=int8)")
ROTATED = ("convrot_w4a4(rotation=16)", "convrot_w4a4", "convrot_w4a4(rotation=64,linear_dtype=int8)")


def both(spec, n, k, x, bias=None):
    """What the Triton kernel and what eager give, on the CPU."""
    packed, _ = packed_weight(spec, n, k, "")
    with use_backend("triton"), torch.inference_mode():
        found = torch.nn.functional.linear(x.to(DEVICE), packed.to(DEVICE), None if bias is None else bias.to(DEVICE))
    return found.cpu(), parse_spec(spec).linear(x, packed.parts, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", UNROTATED)
def test_without_a_rotation_the_bits_are_eagers(spec, dtype):
    """Odd numbers of rows, columns and tokens, with a bias and without one: the same codes, sums and roundings."""
    for m, n, k in ((3, 1, 8), (2, 17, 520), (1, 35, 320), (17, 35, 72)):
        bias = torch.randn(n).to(dtype) if m % 2 else None
        found, wanted = both(spec, n, k, activations(m, k, dtype), bias)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), (n, k, m)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("spec", UNROTATED)
def test_the_largest_sums_are_exact(spec, halves, monkeypatch):
    """All codes and all activations at their ends: nothing overflows on the way to an int32, also by float16."""
    if halves:
        monkeypatch.setattr(linear_convrot_w4a4, "offset_of", lambda _: linear_convrot_w4a4.HALVES)
    fmt, k = parse_spec(spec), 4096
    packed, _ = packed_weight(spec, 16, k, "")
    for code in (0x77, -0x78):  # 7 and -8 in every nibble
        parts = {"qdata": torch.full_like(packed.parts["qdata"], code), "scale": torch.ones(16)}
        x = torch.ones(2, k)
        x[1] = -1
        moved = {name: part.to(DEVICE) for name, part in parts.items()}
        entry = select("linear", fmt.name, "", DEVICE.type, (fmt, x.to(DEVICE), moved, None))
        assert entry.backend == "triton"
        assert torch.equal(entry.run(fmt, x.to(DEVICE), moved, None).cpu(), fmt.linear(x, parts, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ROTATED)
def test_rotated(spec, dtype):
    """The product is eager's but for single codes of activations that lie between two."""
    size = max(parse_spec(spec).rotation, 64)
    for m, n, k in ((1, 1, size), (2, 17, 3 * size), (9, 33, 2 * size)):
        found, wanted = both(spec, n, k, activations(m, k, dtype), torch.randn(n).to(dtype))
        assert relative_error(found, wanted.double()) < 3e-3, (n, k, m)


def test_few_codes_of_rotated_rows_differ():
    """Rotating by sums and differences changes no more than one result in fifty, by the rounding of a single code."""
    found, wanted = both("convrot_w4a4", 16, 512, activations(64, 512, torch.float32))
    rows = ((found - wanted).abs() > 1e-5 * wanted.abs().amax()).any(dim=1)
    assert rows.sum() <= 2


def test_rows_longer_than_what_registers_hold():
    """A row that is read twice, for its scale and for its codes, gives eager's bits."""
    found, wanted = both(UNROTATED[0], 2, 17000, activations(2, 17000, torch.float32))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("spec", "k"), [("convrot_w4a4(rotation=64)", 64), (UNROTATED[1], 40)])
def test_properties(spec, k):
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(spec, 20, k, layout="")


def test_too_many_columns_are_refused():
    """Sums that an int32 does not hold are left to a kernel that is made for them."""
    fmt = parse_spec("convrot_w4a4(rotation=0)")
    k = (1 << 16) + 64
    parts = {"qdata": torch.zeros(1, k // 2, dtype=torch.int8, device=DEVICE), "scale": torch.ones(1, device=DEVICE)}
    said = explain("linear", fmt.name, "", DEVICE.type, (fmt, torch.zeros(1, k, device=DEVICE), parts, None))
    assert "int32" in said["triton:linear_convrot_w4a4"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["convrot_w4a4", "convrot_w4a4(rotation=0)", "convrot_w4a4(linear_dtype=int8)"])
def test_large(spec, dtype):
    """Shapes of real layers give eager's product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 16, 33, 300, 1500):
        found, wanted = both(spec, 6144, 3072, activations(m, 3072, dtype))
        assert relative_error(found, wanted.double()) < 3e-3, m
