"""The named float8 ops: the field's contract, one rounding where the field has two, and PyTorch's own checks."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from lowbit.errors import FormatError, LowbitError, PartsError
from lowbit.ops import dequantize_per_tensor_fp8, quantize_per_tensor_fp8, stochastic_rounding_fp8

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (7,), (0,), (3, 5), (2, 0, 4), (2, 3, 4, 5)]


def bits(t: torch.Tensor) -> torch.Tensor:
    """The codes as bytes, which torch.equal can compare."""
    return t.view(torch.uint8)


@pytest.mark.parametrize("output_type", TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_divides_in_float32_for_any_shape(shape, dtype, output_type):
    """The codes are torch's cast of float32 x / scale, clamped, whatever the dtype of x."""
    x, scale = torch.randn(shape).to(dtype) * 100, torch.tensor(0.0123)
    limit = torch.finfo(output_type).max
    got = quantize_per_tensor_fp8(x, scale, output_type)
    assert (got.shape, got.dtype) == (shape, output_type)
    assert torch.equal(bits(got), bits((x.float() / scale).clamp(-limit, limit).to(output_type)))


@pytest.mark.parametrize("output_type", TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exponent", [-6, 0, 4])
def test_quantize_with_a_power_of_two_is_bit_equal_to_comfy_kitchen(dtype, output_type, exponent):
    """Where multiplying by the reciprocal is exact, the reference gives the same codes."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x, scale = torch.randn(500).to(dtype) * 10, torch.tensor(2.0**exponent)
    assert torch.equal(
        bits(quantize_per_tensor_fp8(x, scale, output_type)),
        bits(kitchen.quantize_per_tensor_fp8(x, scale, output_type)),
    )


def test_quantizing_a_parameter_keeps_no_graph():
    """Codes of a tensor that requires gradients require none."""
    x = torch.nn.Parameter(torch.randn(4))
    assert not quantize_per_tensor_fp8(x, torch.tensor(1.0)).requires_grad
    assert not stochastic_rounding_fp8(x, torch.zeros(4, dtype=torch.uint8)).requires_grad


def test_a_zero_tensor_with_a_zero_scale_stays_zero():
    """amax / 448 of zeros is a scale of 0; elsewhere that gives NaN."""
    x = torch.zeros(8)
    scale = x.abs().amax() / 448
    codes = quantize_per_tensor_fp8(x, scale)
    assert dequantize_per_tensor_fp8(codes, scale).tolist() == [0.0] * 8


def test_large_tensors_are_worked_on_in_pieces_that_do_not_show():
    """More values than one piece holds, from a strided tensor, come out as each on its own."""
    x = torch.randn(700, 900).t()
    codes = quantize_per_tensor_fp8(x, torch.tensor(0.01))
    assert torch.equal(bits(codes), bits((x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()))
    back = dequantize_per_tensor_fp8(codes, torch.tensor(0.01), torch.float32)
    assert torch.equal(back, codes.float() * torch.tensor(0.01))


@pytest.mark.parametrize("input_type", TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_rounds_once(input_type, dtype):
    """All 256 codes times a scale that 16 bits cannot hold: the float32 product, cast; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(input_type)
    scale = torch.tensor([0.0123456])
    got = dequantize_per_tensor_fp8(codes, scale, dtype)
    torch.testing.assert_close(got, (codes.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_dequantize_in_float32_is_bit_equal_to_comfy_kitchen():
    """Where the reference rounds once as well, the bits are the same."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    codes = torch.arange(120, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor(0.0123)
    assert torch.equal(
        dequantize_per_tensor_fp8(codes, scale, torch.float32),
        kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32),
    )


@pytest.mark.parametrize("output_type", TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_bytes_round_like_comfy_kitchen_and_are_left_alone(shape, dtype, output_type):
    """The same bytes give the same codes as the reference, and are not overwritten (its CUDA kernel does that)."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x, rng = torch.randn(shape).to(dtype), torch.randint(0, 256, shape, dtype=torch.uint8)
    before = rng.clone()
    got = stochastic_rounding_fp8(x, rng, output_type)
    assert torch.equal(rng, before)
    theirs = kitchen.stochastic_rounding_fp8(x.reshape(-1), rng.reshape(-1), output_type)  # it takes no scalar
    assert got.shape == shape
    assert torch.equal(bits(got).reshape(-1), bits(theirs))


@pytest.mark.parametrize("output_type", TYPES)
def test_stochastic_rounding_is_unbiased_over_all_bytes(output_type):
    """The mean over the 256 bytes is the value itself, down by at most half a byte's share of a step."""
    x = (torch.rand(500) * 10 + 0.1).half()
    rng = torch.arange(256, dtype=torch.int32).to(torch.uint8)[None].expand(500, 256)
    mean = stochastic_rounding_fp8(x[:, None].expand(500, 256), rng, output_type).float().mean(1)
    step = x.float() * (2**-3 if output_type == torch.float8_e4m3fn else 2**-2)
    assert bool(((mean - x.float()).abs() <= step / 256).all())


def test_stochastic_rounding_at_the_ends():
    """Infinity and what float16 cannot hold saturate, NaN stays NaN, zeros lose their sign."""
    x = torch.tensor([torch.inf, -torch.inf, 1e6, torch.nan, 0.0, -0.0, 1e-10])
    rng = torch.full((7,), 255, dtype=torch.uint8)
    got = stochastic_rounding_fp8(x, rng)
    assert got.float()[:3].tolist() == [448, -448, 448]
    assert got.float()[3].isnan()
    assert bits(got)[4:].tolist() == [0, 0, 0]


X, ONE = torch.linspace(-1, 1, 4), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("op", "args", "error", "message"),
    [
        (quantize_per_tensor_fp8, (X, ONE, torch.int8), FormatError, "output_type is int8, expected float8_e4m3fn or"),
        (quantize_per_tensor_fp8, (X, torch.ones(2)), PartsError, r"scale has shape \[2\], expected one value"),
        (dequantize_per_tensor_fp8, (X, ONE), FormatError, "x is float32, expected float8_e4m3fn or float8_e5m2"),
        (dequantize_per_tensor_fp8, (X.to(TYPES[0]), ONE, torch.int8), FormatError, "output_type is int8, expected bf"),
        (dequantize_per_tensor_fp8, (X.to(TYPES[0]), torch.ones(3)), PartsError, r"scale has shape \[3\]"),
        (stochastic_rounding_fp8, (X, torch.zeros(4, dtype=torch.uint8), torch.int8), FormatError, "output_type is"),
        (stochastic_rounding_fp8, (X, torch.rand(4)), PartsError, r"rng is float32 \[4\], expected uint8 \[4\]"),
        (stochastic_rounding_fp8, (X, torch.zeros(3, dtype=torch.uint8)), PartsError, r"rng is uint8 \[3\], expected"),
    ],
)
def test_wrong_arguments_are_one_clear_error(op, args, error, message):
    """Each is an error of ours, and a ValueError, that says what was given and what was expected."""
    with pytest.raises(error, match=message) as caught:
        op(*args)
    assert isinstance(caught.value, LowbitError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.real_empty
@pytest.mark.usefixtures("_compare_float8")
@pytest.mark.parametrize("shape", [(3, 5), (0,)])
def test_opcheck(shape):
    """Schema, autograd registration, fake tensors and AOT dispatch are sound."""
    x, scale = torch.randn(shape), torch.tensor(0.1)
    codes, rng = quantize_per_tensor_fp8(x, scale), torch.randint(0, 256, shape, dtype=torch.uint8)
    ops = torch.ops.lowbit
    opcheck(ops.quantize_per_tensor_fp8.default, (x, scale, torch.float8_e5m2))
    opcheck(ops.dequantize_per_tensor_fp8.default, (codes, scale, torch.bfloat16))
    opcheck(ops.stochastic_rounding_fp8.default, (x, rng, torch.float8_e4m3fn))


@pytest.mark.real_empty
def test_compile_without_graph_breaks():
    """One graph holds all three ops, and its result is that of eager mode."""

    def function(x, scale, rng):
        codes = quantize_per_tensor_fp8(x, scale)
        back = dequantize_per_tensor_fp8(codes, scale)
        return back, stochastic_rounding_fp8(back, rng).view(torch.uint8)

    args = torch.randn(6, 8), torch.tensor(0.05), torch.randint(0, 256, (6, 8), dtype=torch.uint8)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*args), function(*args), strict=True):
        assert torch.equal(got, expected)
