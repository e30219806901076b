from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lowbit.dispatch import explain, use_backend
from lowbit.ops.int8 import (
    dequantize_int8,
    int8_linear,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
    quantize_int8_tensorwise,
)
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, require

require()


def assert_same(call: Callable[[], object], limit: float = 0.0) -> None:
    """Assert that Triton's results have the reference's shapes, strides and dtypes, and its bits or `limit`."""
    with use_backend("triton"):
        found = call()
    with use_backend("eager"):
        wanted = call()
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for one, other in pairs:
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        if limit:
            assert relative_error(one, other.double()) <= limit
        else:
            assert torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [0, 5])
def test_quantize_rows(seed):
    """Codes and scales of rows are the reference's, with and without noise, for any leading axes."""
    x = activations(21, 96, torch.float32).to(DEVICE)
    assert_same(lambda: quantize_int8_rowwise(x.view(3, 7, 96), seed))
    assert_same(lambda: quantize_int8_rowwise(x[0], seed))
    assert_same(lambda: quantize_int8_rowwise(x[:0], seed))
    assert_same(lambda: quantize_int8_rowwise(x[:, :0], seed))
    assert_same(lambda: quantize_int8_rowwise(activations(2800, 96, torch.float16).to(DEVICE), seed))
    assert_same(lambda: quantize_int8_convrot_weight(x, 16, seed), limit=1e-3)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("scale", [None, 0.02, 0.0, 1e-38])
def test_quantize_tensor(scale, seed):
    """Codes and scale of a tensor are the reference's: of its own maximum, or given, however small."""
    for m, k in ((1, 1), (21, 96), (3, 17), (50, 8000)):
        x = activations(m, k, torch.float32).to(DEVICE)
        assert_same(lambda x=x: quantize_int8_tensorwise(x, scale, seed))
    assert_same(lambda: quantize_int8_tensorwise(x[0, 0], scale, seed))
    assert_same(lambda: quantize_int8_tensorwise(x[:0], scale, seed))
    assert_same(lambda: quantize_int8_tensorwise(x.t(), scale, seed))
    assert_same(lambda: quantize_int8_tensorwise(x[:, ::2].half(), scale, seed))


def test_quantize_tensor_that_is_not_finite():
    """A NaN makes the scale NaN."""
    x = activations(9, 5000, torch.float32)
    x[8, 4999] = float("nan")
    with use_backend("triton"):
        assert quantize_int8_tensorwise(x.to(DEVICE))[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantize(dtype):
    """The value of every code is the reference's, for one scale, one a row and one a code."""
    q = torch.arange(-127, 128, dtype=torch.int8).repeat(6, 1).view(2, 3, 255).to(DEVICE)
    for shape in ((), (1,), (2, 3, 1), (2, 3, 255)):
        scale = torch.rand(shape).to(DEVICE)
        assert_same(lambda s=scale: dequantize_int8(q, s, dtype))
    rows, one = torch.rand(3, 2, 1).to(DEVICE), torch.rand(()).to(DEVICE)
    assert_same(lambda: dequantize_int8(q.transpose(0, 1), rows, dtype))
    assert_same(lambda: dequantize_int8(q[:0], one, dtype))
    assert_same(lambda: dequantize_int8(q[0, 0, 0], one, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear(dtype):
    """The product is the reference's for one scale or N of any shape, with a bias, a rotation, or no columns."""
    x = activations(12, 96, torch.float32).view(3, 4, 96).to(DEVICE)
    weight = torch.randint(-127, 128, (40, 96), dtype=torch.int8).to(DEVICE)
    bias = torch.randn(40).half().to(DEVICE)
    for scale in (
        part.to(DEVICE) for part in (torch.rand(1), torch.rand(40), torch.rand(40, 1).half(), torch.rand(()))
    ):
        assert_same(lambda s=scale: int8_linear(x, weight, s, None, dtype))
        assert_same(lambda s=scale: int8_linear(x, weight, s, bias, dtype))
        assert_same(lambda s=scale: int8_linear(x, weight, s, bias, dtype, True, 16), limit=3e-3)
    one = torch.ones(1, device=DEVICE)
    assert_same(lambda: int8_linear(x[..., :0], weight[:, :0], one, bias, dtype))
    assert_same(lambda: int8_linear(x[:0], weight, one, bias, dtype))


def test_what_they_refuse():
    """Rotations, dtypes and weights that the kernels do not take are refused in words."""
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(8, 64, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(8, device=DEVICE)

    def said(op: str, *args: object) -> str:
        return "; ".join(why for name, why in explain(op, "*", "", DEVICE.type, args).items() if "triton" in name)

    assert "groups of 4" in said("quantize_int8_rowwise", x, 4, 0)
    assert "float64" in said("quantize_int8_rowwise", x.double(), 0, 0)
    assert "float64" in said("int8_linear", x, weight, scale, None, torch.float64, 0)
    assert "gaps" in said(
        "int8_linear", x, torch.zeros(64, 8, dtype=torch.int8, device=DEVICE).t(), scale, None, x.dtype, 0
    )
    assert "float64" in said("dequantize_int8", weight, scale.view(8, 1), torch.float64)
    assert "int16" in said("dequantize_int8", weight.short(), scale.view(8, 1), torch.float32)
