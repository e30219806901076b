"""The named int8 ops: the field's contract on float32, better on 16 bits, any M, and PyTorch's own operator checks."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from lowbit.errors import FormatError, PartsError
from lowbit.numerics.rotations import rotate_groups
from lowbit.ops import (
    dequantize_int8,
    int8_linear,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
    quantize_int8_tensorwise,
)
from tests.support import gaussian, sqnr

LEADS = [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)]


@pytest.fixture
def kitchen():
    """The reference's eager functions."""
    return pytest.importorskip("comfy_kitchen.backends.eager.quantization")


def same(ours, theirs) -> bool:
    """Two results of a quantizer are equal bit by bit."""
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_rows_are_bit_equal_to_comfy_kitchen_on_float32(kitchen):
    """Codes and scales of float32 rows, a zero and a tiny one included, are the reference's."""
    x = torch.randn(4, 50, 96)
    x[1, 2], x[2, 3] = 0, x[2, 3] * 1e-20
    assert same(quantize_int8_rowwise(x), kitchen.quantize_int8_rowwise(x))


@pytest.mark.parametrize("scale", [None, "recalculate", 0.02, torch.tensor(0.03), torch.tensor([0.03])])
def test_tensors_are_bit_equal_to_comfy_kitchen_on_float32(kitchen, scale):
    """With a computed or a given scale; only -128, which the reference emits when clipping, is -127 here."""
    x = torch.randn(50, 96)
    codes, used = quantize_int8_tensorwise(x, scale)
    theirs, their_scale = kitchen.quantize_int8_tensorwise(x, scale)
    assert torch.equal(codes, theirs.clamp(-127, 127))
    assert torch.equal(used, their_scale.reshape(()))


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotated_weights_have_the_codes_of_comfy_kitchen(kitchen, group):
    """Codes are equal on float32 weights; scales to the last bit of the rotation's sums."""
    w = gaussian(64, 512)
    codes, scale = quantize_int8_convrot_weight(w, group)
    theirs, their_scale = kitchen.quantize_int8_convrot_weight(w, group)
    assert torch.equal(codes, theirs)
    torch.testing.assert_close(scale, their_scale, rtol=2e-7, atol=0)


def test_bfloat16_rows_lose_a_fifth_less_than_in_comfy_kitchen(kitchen):
    """The reference divides in bfloat16: 21 % more squared error, and codes of -128."""
    x = gaussian(512, 512, dtype=torch.bfloat16)
    theirs, their_scale = kitchen.quantize_int8_rowwise(x)
    codes, scale = quantize_int8_rowwise(x)
    assert torch.equal(scale, their_scale)
    assert int(theirs.min()) == -128
    assert int(codes.min()) == -127
    assert sqnr(x, codes.float() * scale) > sqnr(x, theirs.float() * their_scale) + 0.6  # 10 log10 1.15


@pytest.mark.parametrize("op", [quantize_int8_rowwise, quantize_int8_tensorwise])
def test_quantizing_a_parameter_keeps_no_graph(op):
    """Codes and scales of a tensor that requires gradients require none."""
    assert not any(t.requires_grad for t in op(torch.nn.Parameter(torch.randn(4, 16))))


@pytest.mark.parametrize("lead", LEADS)
def test_quantizers_take_any_leading_axes(lead):
    """Codes have the shape of x, row scales [..., 1], the tensor's scale none; no rows are fine."""
    x = torch.randn(*lead, 48)
    codes, scale = quantize_int8_rowwise(x)
    assert (codes.shape, scale.shape) == (x.shape, (*lead, 1))
    codes, scale = quantize_int8_tensorwise(x)
    assert (codes.shape, scale.shape) == (x.shape, ())
    assert scale > 0
    codes, scale = quantize_int8_convrot_weight(x, 16)
    assert (codes.shape, scale.shape) == (x.shape, (*lead, 1))


def test_a_scalar_and_an_empty_row_have_a_tensor_scale():
    """No axes and no columns are shapes too."""
    assert quantize_int8_tensorwise(torch.tensor(-2.54))[0].item() == -127
    assert quantize_int8_rowwise(torch.randn(3, 0))[1].shape == (3, 1)


@pytest.mark.parametrize("op", [quantize_int8_rowwise, quantize_int8_tensorwise])
def test_stochastic_rounding_is_seeded_and_unbiased(op):
    """A seed repeats, another differs, 0 and None round to nearest, and the mean over seeds is the value."""
    x = gaussian(40, 64)
    one, again, other = (op(x, stochastic_rounding=seed) for seed in (5, 5, 6))
    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(op(x)[0], op(x, stochastic_rounding=None)[0])
    mean = sum(op(x, stochastic_rounding=seed)[0].float() for seed in range(1, 401)) / 400
    assert (mean - x / one[1]).abs().max() < 0.12
    assert abs((mean - x / one[1]).mean()) < 0.002


def test_stochastic_rounding_differs_between_pieces():
    """Rows beyond the first piece get noise of their own."""
    x = torch.full((2000, 512), 0.3)
    x[:, 0] = 127
    codes = quantize_int8_rowwise(x, 3)[0]
    assert not torch.equal(codes[:512], codes[512:1024])


@pytest.mark.parametrize("output_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_shape", [(), (1,), (2, 30, 1), (2, 30, 40)])
def test_dequantize_rounds_once(scale_shape, output_type):
    """One scale, one a row or one a code: the float32 product, cast."""
    q, scale = torch.randint(-127, 128, (2, 30, 40), dtype=torch.int8), torch.rand(scale_shape)
    assert torch.equal(dequantize_int8(q, scale, output_type), (q.float() * scale).to(output_type))


def test_dequantize_in_pieces_of_many_rows():
    """More rows than one piece holds keep their own scales."""
    q, scale = torch.randint(-127, 128, (3000, 200), dtype=torch.int8), torch.rand(3000, 1)
    assert torch.equal(dequantize_int8(q, scale, torch.float32), q.float() * scale)


@pytest.mark.parametrize("convrot", [False, True])
@pytest.mark.parametrize("scales", [(), (40,), (40, 1)])
def test_linear_is_bit_equal_to_comfy_kitchen_on_float32(kitchen, convrot, scales):
    """An exact integer product and the same order of float32 operations."""
    x, weight = torch.randn(2, 7, 128), torch.randint(-127, 128, (40, 128), dtype=torch.int8)
    args = (x, weight, torch.rand(scales), torch.randn(40), torch.float32, convrot, 64)
    assert torch.equal(int8_linear(*args), kitchen.int8_linear(*args))


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_takes_any_leading_axes(lead, dtype):
    """M = 0 and M = 1 included; the default output is bfloat16, and bias is added before the one rounding."""
    x, weight = torch.randn(*lead, 100).to(dtype), torch.randint(-127, 128, (33, 100), dtype=torch.int8)
    scale, bias = torch.rand(33) * 0.01, torch.randn(33)
    y = int8_linear(x, weight, scale, bias)
    assert (y.shape, y.dtype) == ((*lead, 33), torch.bfloat16)
    assert torch.equal(y, int8_linear(x, weight, scale, bias, torch.float32).bfloat16())


def test_rotating_both_sides_changes_nothing_but_the_rounding():
    """A rotated weight with convrot gives the product of the original weight and x."""
    w, x = gaussian(64, 256), torch.randn(10, 256)
    codes, scale = quantize_int8_convrot_weight(w, 256)
    assert sqnr(x @ w.t(), int8_linear(x, codes, scale, None, torch.float32, convrot=True)) > 38


@pytest.mark.parametrize("convrot", [False, True])
def test_x_and_bias_get_gradients_through_the_frozen_weight(convrot):
    """The gradient of x is grad times the decoded weight, that of bias the sum over rows, in their own dtypes."""
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, scale = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40, 1) * 0.01
    bias = torch.randn(40, requires_grad=True)
    y = int8_linear(x, weight, scale, bias, torch.float32, convrot, 16)
    grad = torch.randn_like(y)
    y.backward(grad)
    w = weight.float() * scale
    w = rotate_groups(w, 16) if convrot else w
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(x.grad, (grad @ w).bfloat16(), rtol=0.01, atol=1e-3)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


W = torch.ones(8, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: int8_linear(torch.randn(2, 31), W, torch.ones(8)),
            PartsError,
            r"x has shape \[2, 31\], expected \[.*32",
        ),
        (lambda: int8_linear(torch.randn(2, 32), W.float(), torch.ones(8)), PartsError, "weight is float32"),
        (lambda: int8_linear(torch.randn(2, 32), W, torch.ones(7)), PartsError, r"weight_scale has shape \[7\]"),
        (
            lambda: int8_linear(torch.randn(2, 32), W, torch.ones(8), torch.ones(2, 8)),
            PartsError,
            r"bias has shape \[2, 8\], expected \[8\]; add a matrix to the result",
        ),
        (
            lambda: int8_linear(torch.randn(2, 32), W, torch.ones(8), convrot=True),
            FormatError,
            "K = 32 is not a multiple of the rotation group 256",
        ),
        (lambda: quantize_int8_convrot_weight(torch.randn(2, 32), 8), FormatError, "power of 4, not 8"),
        (lambda: quantize_int8_tensorwise(torch.randn(4), "auto"), FormatError, "scale is 'auto'"),
        (lambda: quantize_int8_tensorwise(torch.randn(4), torch.ones(4)), PartsError, r"scale has shape \[4\]"),
        (lambda: quantize_int8_rowwise(torch.tensor(1.0)), PartsError, "x has no axes"),
        (
            lambda: dequantize_int8(W, torch.ones(32), torch.float32),
            PartsError,
            r"scale has shape \[32\], expected",
        ),
    ],
)
def test_wrong_arguments_are_one_clear_error(call, error, message):
    """Each says what was given and what was expected."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.real_empty
@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(rows):
    """Schema, autograd registration, fake tensors and AOT dispatch are sound, gradients included."""
    x, q, scale = torch.randn(rows, 32), torch.randint(-127, 128, (8, 32), dtype=torch.int8), torch.rand(8, 1)
    ops = torch.ops.lowbit
    opcheck(ops.quantize_int8_rowwise.default, (x, 0))
    opcheck(ops.quantize_int8_convrot_weight.default, (x, 16, 3))
    opcheck(ops.quantize_int8_tensorwise.default, (x, None, 7))
    opcheck(ops.quantize_int8_tensorwise.default, (x, torch.tensor(0.1), 0))
    opcheck(ops.dequantize_int8.default, (q, scale, torch.bfloat16))
    opcheck(ops.int8_linear_input_gradient.default, (torch.randn(rows, 8), q, scale, 0))
    grad_x, grad_bias = x.clone().requires_grad_(), torch.randn(8, requires_grad=True)
    opcheck(ops.int8_linear.default, (grad_x, q, scale, grad_bias, torch.bfloat16, 16))
    opcheck(ops.int8_linear.default, (x, q, scale, None, torch.float32, 0))


@pytest.mark.real_empty
def test_compile_without_graph_breaks():
    """One graph quantizes, multiplies and dequantizes, forward and backward, with the results of eager mode."""

    def function(x, w):
        codes, scale = quantize_int8_convrot_weight(w, 16)
        tensor, one = quantize_int8_tensorwise(w, 0.5, 3)
        y = int8_linear(x, codes, scale, None, torch.float32, convrot=True, convrot_groupsize=16)
        return y + dequantize_int8(tensor, one, torch.float32).sum()

    w, x = torch.randn(8, 32), torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [f(x, w) for f in (compiled, function)]
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in results]
    assert torch.equal(*results)
    assert torch.equal(*gradients)
