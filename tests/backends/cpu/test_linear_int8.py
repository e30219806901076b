from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.numerics.rotations import regular_hadamard
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, activations, check_linear, check_properties, packed_weight

linear_int8 = pytest.importorskip("lowbit.backends.cpu.linear_int8", reason="no compiled kernels", exc_type=ImportError)
WAYS = {"bytes": 1 << 30, "pairs": 0}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each of the two ways of multiplying integers, for all numbers of tokens."""
    few = WAYS[request.param]
    monkeypatch.setattr(linear_int8, "_FEW_BYTES", dict.fromkeys(("avx2", "portable"), few))
    return request.param


def both(x: torch.Tensor, spec: str, n: int, k: int, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """The native and the reference's product."""
    packed, _ = packed_weight(spec, n, k, "rows16")
    plain = packed.in_layout("")
    with torch.inference_mode():
        with use_backend("cpu"):
            found = F.linear(x, packed, bias)
            assert torch.allclose(F.linear(x, plain, bias), found, rtol=0, atol=0, equal_nan=True)
        with use_backend("eager"):
            return found, F.linear(x, plain, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "k"),
    [
        ("int8", 1120),
        ("int8(granularity=tensor)", 1120),
        ("int8(granularity=block,block_size=32x16)", 96),
        ("int8(granularity=block,block_size=1x32)", 96),
        ("int8(granularity=block,block_size=24x544)", 1088),
    ],
)
def test_products_are_those_of_the_reference_bit_for_bit(spec, k, dtype, way):
    """Codes of the activations, integer sums and the roundings behind them are the reference's, whatever the shape."""
    for n in ROWS:
        bias = torch.randn(n).to(dtype)
        assert torch.equal(*both(activations(3, k, dtype), spec, n, k, bias)), n
    for m in TOKENS:
        assert torch.equal(*both(activations(m, k, dtype), spec, 35, k)), m


def test_extreme_integers_do_not_saturate(way):
    """Sums of the largest codes of both signs, -128 of foreign files among them, are exact."""
    n, k = 20, 4096
    codes = torch.where(torch.rand(n, k) < 0.5, -128, 127).to(torch.int8)
    codes[0], codes[1] = 127, -128
    scale = torch.full((n, 1), 0.5)
    plain = QuantizedTensor.from_parts({"qdata": codes, "scale": scale}, "int8", (n, k), torch.float32)
    x = torch.where(torch.rand(9, k) < 0.5, -1.0, 1.0)
    x[0], x[1] = 1, -1
    with use_backend("cpu"), torch.inference_mode():
        found = F.linear(x, plain.in_layout("rows16"))
    wanted = ((x * 127).double() @ codes.double().t()).float() * (torch.tensor(1.0) / 127 * 0.5)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("rotation", [16, 64, 256, 1024])
def test_rotated_activations_are_rounded_as_the_exact_rotation_is(rotation, way):
    """The activations are those of a rotation in float64, except where that lies within float32's error of a tie."""
    k = 1024
    weight = torch.zeros(k, k, dtype=torch.int8).fill_diagonal_(1)  # the product is the codes, times their scale
    parts = {"qdata": weight, "scale": torch.ones(k, 1)}
    packed = QuantizedTensor.from_parts(parts, f"int8(rotation={rotation})", (k, k), torch.float32).in_layout("rows16")
    x = activations(7, k, torch.float32)
    rotated = (x.double().view(-1, rotation) @ regular_hadamard(rotation).double()).view(7, k)
    scale = (rotated.abs().amax(dim=1, keepdim=True) / 127).float()
    with use_backend("cpu"), torch.inference_mode():
        codes = F.linear(x, packed) / scale
    steps = rotated / scale.double()
    assert ((codes - codes.round()).abs() < 1e-3).all()
    assert ((steps - codes.round()).abs() <= 0.5 + 1e-4).all()


def test_rows_of_zeros_and_rows_that_are_not_finite(way):
    """A zero row gives the bias, a tiny one its product, and one with a NaN or an infinity no finite number."""
    x = activations(6, 96, torch.float32)
    x[1], x[2] = 0, x[2] * 1e-25
    x[3, 5], x[4, 90], x[5, 7] = float("nan"), float("inf"), float("-inf")
    bias = torch.randn(20)
    found, wanted = both(x, "int8", 20, 96, bias)
    assert torch.equal(found[:3], wanted[:3])
    assert torch.equal(found[1], bias)
    assert not found[3:].isfinite().any()
    assert torch.equal(found[3].isnan(), torch.ones(20, dtype=torch.bool))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", ["", ",granularity=tensor", ",granularity=block,block_size=48x32", ",rotation=16"])
def test_weights_alone(rest, dtype):
    """With activations=none the product equals that of the dequantized weight."""
    spec = f"int8(activations=none{rest})"
    for n in ROWS:
        check_linear(spec, n, 96, 3, dtype)
    for m in TOKENS:
        check_linear(spec, 35, 544, m, dtype, bias=m % 2 == 0)


@pytest.mark.parametrize("spec", ["int8", "int8(rotation=64)", "int8(granularity=block,block_size=16x64)"])
def test_properties(spec):
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties(spec, 100, 512)
    check_properties(f"{spec.removesuffix(')')}{',' if '(' in spec else '('}activations=none)", 16, 64)


def test_what_it_refuses():
    """Sums that could overflow, and tiles that cross words, are refused in words; the reference takes them."""
    fmt, x = QuantizedTensor.quantize(torch.randn(16, 64), "int8").format, torch.zeros(1, 1 << 17)
    assert "overflow" in linear_int8.refuses(fmt, x, {}, None)
    packed, _ = packed_weight("int8(granularity=block,block_size=16x6)", 16, 24, "rows16")
    x = activations(3, 24, torch.float32)
    assert "multiples of 4" in linear_int8.refuses(packed.format, x, packed.parts, None)
    with torch.inference_mode():
        assert torch.allclose(F.linear(x, packed), F.linear(x, packed.in_layout("")))
