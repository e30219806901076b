"""gemv_awq_w4a16: comfy-kitchen's contract, the dtype of x, gradients, and PyTorch's own operator checks."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import lowbit
from lowbit.errors import PartsError
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.base import DECODE_ELEMENTS
from lowbit.ops import gemv_awq_w4a16
from tests.support import gaussian, widened

LEADS = [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3)]


def _weight(n=48, k=128, group=64, dtype=torch.float32):
    parts = AwqW4A16(group_size=group).quantize(gaussian(n, k, dtype=dtype))
    parts = widened(parts) if dtype == torch.float32 else parts
    return parts["qdata"], parts["scale"], parts["zero"]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bit_equal_to_comfy_kitchen_on_float32(group, with_bias):
    """The same float32 tensors give the same bits as the reference's eager op."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.awq")
    weight, x = _weight(group=group), torch.randn(5, 128)
    bias = torch.randn(48) if with_bias else None

    theirs = kitchen.gemv_awq_w4a16(x, *weight, bias, group)

    assert torch.equal(gemv_awq_w4a16(x, *weight, None, group), kitchen.gemv_awq_w4a16(x, *weight, None, group))
    torch.testing.assert_close(gemv_awq_w4a16(x, *weight, bias, group), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_close_to_comfy_kitchen_in_16_bits(dtype):
    """Where x and scales share a 16-bit dtype, results differ from the reference only by its rounding of the weight."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.awq")
    weight, x = _weight(dtype=dtype), torch.randn(5, 128, dtype=dtype)

    ours, theirs = gemv_awq_w4a16(x, *weight), kitchen.gemv_awq_w4a16(x, *weight)

    assert ours.dtype == theirs.dtype == dtype
    assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_dequantize_and_matmul(lead, dtype):
    """Any leading shape; the result is that of dequantize() and F.linear in the dtype of x, bit for bit."""
    q, scale, zero = _weight(dtype=torch.bfloat16)
    x, bias = torch.randn(*lead, 128).to(dtype), torch.randn(48).to(dtype)
    dense = AwqW4A16().dequantize({"qdata": q, "scale": scale, "zero": zero}, (48, 128), dtype)

    y = gemv_awq_w4a16(x, q, scale, zero, bias)

    assert y.shape == (*lead, 48)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, dense, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_on_a_quantized_tensor_equals_dequantize_and_matmul(dtype):
    """In eager F.linear with an awq weight is dequantize() + F.linear bit for bit, in all three gradient modes."""
    weight = lowbit.QuantizedTensor.quantize(gaussian(48, 128, dtype=dtype), "awq_w4a16")
    x, bias = torch.randn(3, 128).to(dtype), torch.randn(48).to(dtype)
    expected = F.linear(x, weight.dequantize(), bias)

    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), lowbit.use_backend("eager"):
            assert torch.equal(F.linear(x, weight, bias), expected)


def test_a_weight_of_several_pieces():
    """A weight beyond one piece is multiplied piece by piece, with the same result up to the order of summation."""
    n, k = 3 * 128 + 7, DECODE_ELEMENTS // 256
    weight, x = _weight(n, k), torch.randn(2, k)
    dense = AwqW4A16().dequantize(dict(zip(("qdata", "scale", "zero"), weight, strict=True)), (n, k), torch.float32)

    assert n * k > DECODE_ELEMENTS
    torch.testing.assert_close(gemv_awq_w4a16(x, *weight), x @ dense.t(), rtol=1e-4, atol=1e-3)


def test_gradients_pass_through_the_frozen_weight():
    """x and bias get the gradients of the dense linear; the bias may have a wider dtype than x."""
    q, scale, zero = _weight()
    dense = AwqW4A16().dequantize({"qdata": q, "scale": scale, "zero": zero}, (48, 128), torch.float32)
    x, bias = torch.randn(2, 3, 128, requires_grad=True), torch.randn(48, requires_grad=True)
    grad = torch.randn(2, 3, 48)

    gemv_awq_w4a16(x, q, scale, zero, bias).backward(grad)

    torch.testing.assert_close(x.grad, grad @ dense)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(48, 64)}, "qweight is float32"),
        ({"qweight": torch.zeros(48, 1, 64, dtype=torch.int8)}, "qweight is int8"),
        ({"x": torch.randn(5, 127)}, r"x is float32 \[5, 127\]"),
        ({"x": torch.zeros(5, 128, dtype=torch.int32)}, "x is int32"),
        ({"x": torch.tensor(1.0)}, "x is"),
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 32}, "wscales is"),
        ({"wzeros": torch.zeros(48, 2)}, "wzeros is"),
        ({"wzeros": torch.zeros(2, 48, dtype=torch.float16)}, "alike"),
        ({"bias": torch.zeros(47)}, "bias has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    """One error names the tensor, what it is and what was expected, also while tracing."""
    names = ("qweight", "wscales", "wzeros")
    arguments = {"x": torch.randn(5, 128), **dict(zip(names, _weight(), strict=True)), **change}

    with pytest.raises(PartsError, match=message):
        gemv_awq_w4a16(**arguments)


@pytest.mark.real_empty
@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(rows):
    """Schema, autograd registration, fake tensors and AOT dispatch are sound, gradients included."""
    weight, x, bias = _weight(), torch.randn(rows, 128, requires_grad=True), torch.randn(48, requires_grad=True)

    opcheck(torch.ops.lowbit.gemv_awq_w4a16.default, (x, *weight, bias, 64))
    opcheck(torch.ops.lowbit.gemv_awq_w4a16.default, (x.detach(), *weight, None, 64))
    opcheck(torch.ops.lowbit.gemv_awq_w4a16_input_gradient.default, (torch.randn(rows, 48), *weight, 64))


@pytest.mark.real_empty
def test_compile_without_graph_breaks():
    """One graph runs forward and backward with the results of eager mode."""
    weight, bias = _weight(), torch.randn(48)

    def function(x):
        return gemv_awq_w4a16(x, *weight, bias).square().sum()

    x, y = torch.randn(3, 128, requires_grad=True), torch.zeros(0)
    function(x).backward()
    expected = x.grad.clone()
    x.grad = None
    y = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    y.backward()

    torch.testing.assert_close(y, function(x))
    torch.testing.assert_close(x.grad, expected)
