from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.formats import base
from lowbit.ops import int8_linear
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROUNDING, activations, relative_error

linear_plain = pytest.importorskip(
    "lowbit.backends.cpu.linear_plain", reason="no compiled kernels", exc_type=ImportError
)
linear_int8 = pytest.importorskip("lowbit.backends.cpu.linear_int8", reason="no compiled kernels", exc_type=ImportError)

SPECS = (
    "fp8_e4m3",
    "fp8_e5m2(granularity=block,block_size=16x32)",
    "int8(activations=none)",
    "nvfp4",
    "mxfp4",
    "mxfp8",
    "awq_w4a16(group_size=32)",
    "wna16(group_size=32)",
    "wna16(bits=8,group_size=32,zero_point=True)",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_products_are_those_of_the_reference(spec, dtype, monkeypatch):
    """Whole weights and ones decoded in pieces give the reference's float32 bits, and exacter ones on 16 bits."""
    weight = QuantizedTensor.quantize(torch.randn(50, 64), spec, dtype=dtype)
    for pieces in (1, 3):
        for module in (linear_plain, base):
            monkeypatch.setattr(module, "DECODE_ELEMENTS", 50 * 64 // pieces)
        for shape, bias in (((64,), None), ((5, 64), torch.randn(50).to(dtype)), ((2, 3, 64), None), ((0, 64), None)):
            x = torch.randn(shape).to(dtype)
            with torch.inference_mode():
                with use_backend("cpu"):
                    found = F.linear(x, weight, bias)
                if dtype == torch.float32:
                    with use_backend("eager"):
                        assert torch.equal(found, F.linear(x, weight, bias)), (shape, pieces)
                exact = x.double() @ weight.dequantize(torch.float32).double().t()
                exact = exact if bias is None else exact + bias.double()
                assert found.dtype == dtype
                assert relative_error(found, exact) <= max(ROUNDING[dtype], 1e-6), (shape, pieces)


@pytest.mark.parametrize("few", [0, 1 << 30])
@pytest.mark.parametrize("scales", ["one", "rows"])
@pytest.mark.parametrize("n", [1, 16, 35])
def test_the_named_int8_op(n, scales, few, monkeypatch):
    """`int8_linear` gives the reference's bits for each pair of dtypes, one scale or one a row, any N and M."""
    monkeypatch.setattr(linear_int8, "_FEW_BYTES", dict.fromkeys(("avx2", "portable"), few))
    weight = torch.randint(-128, 128, (n, 84)).to(torch.int8)
    scale = torch.rand(()) if scales == "one" else torch.rand(n, 1)
    for m, dtype, out_dtype in (
        (1, torch.float32, torch.bfloat16),
        (7, torch.bfloat16, torch.float32),
        (40, *DTYPES[:2]),
    ):
        x, bias = activations(m, 84, dtype), torch.randn(n).to(dtype)
        with use_backend("cpu"):
            found = int8_linear(x.view(1, m, 84), weight, scale, bias, out_dtype)
        with use_backend("eager"):
            assert torch.equal(found, int8_linear(x.view(1, m, 84), weight, scale, bias, out_dtype))


def test_the_named_int8_op_rotates():
    """A rotated product is the reference's, bit for bit."""
    weight, x = torch.randint(-127, 128, (33, 256)).to(torch.int8), activations(9, 256, torch.bfloat16)
    for group in (4, 64):
        with use_backend("cpu"):
            found = int8_linear(x, weight, torch.ones(33), None, torch.float32, True, group)
        with use_backend("eager"):
            assert torch.equal(found, int8_linear(x, weight, torch.ones(33), None, torch.float32, True, group))


def test_what_the_named_op_refuses():
    """Rows that are no whole words, and float64, are refused in words and left to the reference."""
    for columns, dtype, why in ((6, torch.float32, "multiples of 4"), (8, torch.float64, "have to be")):
        x, weight = torch.randn(2, columns).to(dtype), torch.ones(3, columns, dtype=torch.int8)
        assert why in linear_int8.refuses_op(x, weight, torch.ones(3), None, dtype, 0)
        assert int8_linear(x, weight, torch.ones(3), None, dtype).shape == (2, 3)


def test_codes_off_the_border_of_a_word_are_refused():
    """A view of codes that begins inside a word is left to the reference."""
    weight = torch.ones(3 * 8 + 1, dtype=torch.int8)[1:].view(3, 8)
    assert "4 bytes" in linear_int8.refuses_op(torch.ones(2, 8), weight, torch.ones(3), None, torch.float32, 0)
    assert "4 bytes" in linear_int8.refuses_op(torch.ones(2, 4), weight[:, :4], torch.ones(3), None, torch.float32, 0)
