from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import activations, packed_weight, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, check_properties, require, triton_kernel

require()
from lowbit.backends.triton import int8_gemm, linear_int8  # noqa: E402  (only where Triton is)

EXACT = ("int8", "int8(granularity=tensor)")
TILES = (
    "int8(granularity=block)",
    "int8(granularity=block,block_size=24x32)",
    "int8(granularity=block,block_size=64x256)",
)


def both(x: torch.Tensor, spec: str, n: int, k: int, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Triton's and the reference's product, and the kernel's declared tolerance."""
    packed, _ = packed_weight(spec, n, k, "")
    packed = packed.to(DEVICE)
    x, bias = x.to(DEVICE), None if bias is None else bias.to(DEVICE)
    tolerance = triton_kernel(spec, "", x, packed, bias).tolerance
    with torch.inference_mode():
        with use_backend("triton"):
            found = F.linear(x, packed, bias)
        with use_backend("eager"):
            return found, F.linear(x, packed, bias), tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", EXACT)
def test_products_are_those_of_the_reference_bit_for_bit(spec, dtype):
    """Codes, integer sums and the roundings behind them are the reference's, whatever the shape."""
    for n in (1, 17, 100):
        found, wanted, _ = both(activations(3, 48, dtype), spec, n, 48, torch.randn(n).to(dtype))
        assert torch.equal(found, wanted), n
    # K in pieces, at addresses of every kind, and each tile of tokens.
    for m, k in ((1, 1040), (3, 77), (17, 48), (40, 64), (130, 16), (2, 6)):
        found, wanted, _ = both(activations(m, k, dtype), spec, 35, k)
        assert torch.equal(found, wanted), (m, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*TILES, "int8(rotation=16)", "int8(rotation=64)", "int8(rotation=256)"])
def test_products(spec, dtype):
    """The product is the reference's, up to the order in which float32 numbers are added."""
    for n, m, k in ((1, 3, 256), (100, 1, 768), (35, 17, 256)):
        bias = torch.randn(n).to(dtype) if m > 1 else None
        found, wanted, tolerance = both(activations(m, k, dtype), spec, n, k, bias)
        assert found.dtype == dtype
        # A rotated activation next to a tie may fall on its other side.
        exact = 1e-6 if "rotation" not in spec else tolerance
        assert relative_error(found, wanted.double()) <= (exact if dtype == torch.float32 else tolerance), (n, m, k)


@pytest.mark.parametrize("k", [77, 200, 330])
def test_tiles_at_the_end_of_a_row(k):
    """A last tile that is short, at addresses of any kind, gives the reference's product."""
    found, wanted, _ = both(activations(5, k, torch.float32), "int8(granularity=block,block_size=48x64)", 70, k)
    assert relative_error(found, wanted.double()) <= 1e-6


def test_extreme_integers_do_not_overflow():
    """Sums of the largest codes of both signs, -128 of foreign files among them, are exact."""
    n, k = 20, 2048
    codes = torch.where(torch.rand(n, k) < 0.5, -128, 127).to(torch.int8)
    codes[0], codes[1] = 127, -128
    parts = {"qdata": codes, "scale": torch.full((n, 1), 0.5)}
    plain = QuantizedTensor.from_parts(parts, "int8", (n, k), torch.float32).to(DEVICE)
    x = torch.where(torch.rand(9, k) < 0.5, -1.0, 1.0)
    x[0], x[1] = 1, -1
    with use_backend("triton"), torch.inference_mode():
        found = F.linear(x.to(DEVICE), plain).cpu()
    wanted = ((x * 127).double() @ codes.double().t()).float() * (torch.tensor(1.0) / 127 * 0.5)
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_rows_of_zeros_and_rows_that_are_not_finite():
    """A zero row gives the bias, a tiny one its product, and one with a NaN or an infinity no finite number."""
    x = activations(6, 96, torch.float32)
    x[1], x[2] = 0, x[2] * 1e-25
    x[3, 5], x[4, 90], x[5, 7] = float("nan"), float("inf"), float("-inf")
    bias = torch.randn(20)
    found, wanted, _ = both(x, "int8", 20, 96, bias)
    assert torch.equal(found[:3], wanted[:3])
    assert torch.equal(found[1].cpu(), bias)
    assert not found[3:].isfinite().any()


@pytest.mark.parametrize("spec", ["int8", "int8(rotation=64)", TILES[0]])
def test_properties(spec):
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(spec, 20, 64, layout="")


@pytest.mark.parametrize("rest", ["", ",granularity=tensor", ",granularity=block,block_size=48x32", ",rotation=16"])
def test_weights_alone(rest):
    """With activations=none the weight alone is decoded: the product is that of the activations as they are."""
    spec = f"int8(activations=none{rest})"
    packed, weight = packed_weight(spec, 35, 96, "")
    x = activations(5, 96, torch.float32)
    with use_backend("triton"), torch.inference_mode():
        found = F.linear(x.to(DEVICE), packed.to(DEVICE)).cpu()
    assert relative_error(found, x.double() @ weight.t()) <= 1e-5


def test_what_it_refuses(monkeypatch):
    """Sums that could overflow, odd tiles, codes with gaps and GPUs without the instruction are refused in words."""
    packed, _ = packed_weight("int8", 16, 64, "")
    packed = packed.to(DEVICE)
    x = torch.zeros(1, 64, device=DEVICE)
    assert linear_int8.refuses(packed.format, x, packed.parts, None) is None
    assert "overflow" in linear_int8.refuses(packed.format, torch.zeros(1, 1 << 17, device=DEVICE), packed.parts, None)
    gaps = {**packed.parts, "qdata": packed.parts["qdata"][:, ::2]}
    assert "gaps" in linear_int8.refuses(packed.format, x, gaps, None)
    odd, _ = packed_weight("int8(granularity=block,block_size=16x48)", 16, 96, "")
    assert "powers of two" in linear_int8.refuses(odd.format, x, odd.parts, None)
    with int8_gemm.device.assume(int8_gemm.device.Target("cuda", (7, 5))):
        assert "7.5" in linear_int8.refuses(packed.format, x, packed.parts, None)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["int8", "int8(rotation=256)", TILES[0]])
def test_large(spec):
    """Shapes of real layers give the reference's product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 100, 300, 1500):
        for n, k in ((12288, 3072), (3072, 12288)):
            found, wanted, tolerance = both(activations(m, k, torch.bfloat16), spec, n, k)
            assert relative_error(found, wanted.double()) <= (0 if spec == "int8" else tolerance), (m, n, k)
