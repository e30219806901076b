"""The named mxfp8 ops: contracts, oracles, errors, tracing."""

import pytest
import torch
from torch.library import opcheck

import lowbit
from lowbit.errors import FormatError, PartsError, WeightError
from lowbit.layouts.scale_128x4 import swizzle, swizzled_shape, unswizzle
from lowbit.ops import dequantize_mxfp8, quantize_mxfp8, scaled_mm_mxfp8
from tests.support import gaussian, sqnr


def _operands(m, n, k):
    """Two quantized matrices: their codes, scales and values in float64."""
    a, scale_a = quantize_mxfp8(gaussian(m, k, seed=1))
    b, scale_b = quantize_mxfp8(gaussian(n, k, seed=2))
    values = (dequantize_mxfp8(q, scale, torch.float64) for q, scale in ((a, scale_a), (b, scale_b)))
    return (a, b, scale_a, scale_b), *values


@pytest.mark.parametrize(("m", "k"), [(1, 32), (17, 64), (129, 160), (0, 32)])
def test_codes_and_scales_are_the_format_s(m, k):
    """The op and the format `mxfp8` make the same codes and scales, these swizzled and typed as e8m0."""
    x = gaussian(m, k)
    parts = lowbit.parse_spec("mxfp8").quantize(x)

    codes, scale = quantize_mxfp8(x)

    assert torch.equal(codes.view(torch.uint8), parts["qdata"].view(torch.uint8))
    assert scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(scale.view(torch.uint8), swizzle(parts["scale"]))
    assert tuple(scale.shape) == swizzled_shape(m, k // 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(129, 128), (33, 65), (65, 96), (1, 1)])
def test_padding_and_values_are_those_of_comfy_kitchen(shape, dtype):
    """With pad_32x, codes, scales and decoded values equal comfy-kitchen's eager ops bit for bit, for every dtype."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = gaussian(*shape, dtype=dtype)

    codes, scale = quantize_mxfp8(x, pad_32x=True)
    expected, blocked = kitchen.quantize_mxfp8(x, pad_32x=True)

    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale.view(torch.uint8), blocked.view(torch.uint8))
    assert torch.equal(dequantize_mxfp8(codes, scale, dtype), kitchen.dequantize_mxfp8(codes, scale, dtype))


def test_tiny_groups_keep_their_values():
    """Scale code 0 is 2**-127: values that comfy-kitchen loses are exact here."""
    x = torch.full((1, 32), 2.0**-130)

    codes, scale = quantize_mxfp8(x)

    assert torch.equal(dequantize_mxfp8(codes, scale, torch.float32), x)


def test_nan_and_infinity_in_x():
    """NaN and infinity stay what they are, where they stand; all other values are finite."""
    x = gaussian(2, 64)
    x[0, 3], x[1, 40] = float("nan"), float("inf")

    back = dequantize_mxfp8(*quantize_mxfp8(x), torch.float32)

    assert back.isnan().nonzero().tolist() == [[0, 3]]
    assert back.isinf().nonzero().tolist() == [[1, 40]]


def test_scales_may_be_uint8():
    """Scales read from a file as uint8 codes are taken as they are."""
    codes, scale = quantize_mxfp8(gaussian(4, 64))

    assert torch.equal(dequantize_mxfp8(codes, scale.view(torch.uint8)), dequantize_mxfp8(codes, scale))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 32), (17, 33, 64), (5, 130, 256), (0, 3, 32)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_that_of_the_decoded_operands(m, n, k, with_bias):
    """scaled_mm equals the float64 product of the decoded operands, plus bias, to float32 accuracy."""
    operands, va, vb = _operands(m, n, k)
    bias = torch.randn(n) if with_bias else None

    out = scaled_mm_mxfp8(*operands, bias, torch.float32)

    expected = va @ vb.T + (bias.double() if with_bias else 0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)
    assert torch.equal(scaled_mm_mxfp8(*operands, bias), out.bfloat16())


def test_large_operands_are_decoded_in_pieces(monkeypatch):
    """The product in many pieces of both operands equals the one in a single piece."""
    operands, _, _ = _operands(40, 50, 64)
    whole = scaled_mm_mxfp8(*operands, None, torch.float32)

    monkeypatch.setattr("lowbit.backends.eager.block_scaled.DECODE_ELEMENTS", 7 * 64)

    assert sqnr(whole, scaled_mm_mxfp8(*operands, None, torch.float32)) > 110


def test_unfit_arguments_are_named():
    """Each wrong operand gives one LowbitError that says what was expected."""
    operands, _, _ = _operands(8, 8, 64)
    a, b, scale_a, scale_b = operands

    with pytest.raises(WeightError, match=r"K = 40 is not a multiple of 32; pass pad_32x=True"):
        quantize_mxfp8(torch.randn(4, 40))
    with pytest.raises(WeightError, match="takes a 2-D floating-point x, not a 1-D float32"):
        quantize_mxfp8(torch.randn(32))
    with pytest.raises(PartsError, match=r"qx is uint8 \[8, 64\], expected float8_e4m3fn \[rows, K\]"):
        dequantize_mxfp8(a.view(torch.uint8), scale_a)
    with pytest.raises(
        PartsError, match=r"the scales of qx are float8_e8m0fnu \[8, 2\], expected .* \[128, 4\], swizzled"
    ):
        dequantize_mxfp8(a, unswizzle(scale_a, 8, 2))
    with pytest.raises(FormatError, match="out_dtype is float8_e4m3fn, expected a floating-point type"):
        scaled_mm_mxfp8(*operands, None, torch.float8_e4m3fn)
    with pytest.raises(PartsError, match="a has K = 64 and b has K = 32"):
        scaled_mm_mxfp8(a, b[:, :32].contiguous(), scale_a, scale_b)
    with pytest.raises(PartsError, match=r"bias has shape \[7\], expected \[8\]"):
        scaled_mm_mxfp8(*operands, torch.randn(7))


@pytest.mark.real_empty
@pytest.mark.usefixtures("_compare_float8")
def test_opcheck():
    """Schemas, fake tensors and AOT dispatch of the three ops are sound."""
    operands, _, _ = _operands(17, 8, 64)
    ops = torch.ops.lowbit

    opcheck(ops.quantize_mxfp8.default, (torch.randn(17, 40), True))
    opcheck(ops.dequantize_mxfp8.default, (operands[0], operands[2], torch.bfloat16))
    opcheck(ops.scaled_mm_mxfp8.default, (*operands, torch.randn(8), torch.float32))
    opcheck(ops.scaled_mm_mxfp8.default, (*operands, None, torch.bfloat16))


@pytest.mark.real_empty
def test_compiles_as_one_graph():
    """A dynamically quantized linear is one graph under torch.compile, with the same result."""
    codes, scale = quantize_mxfp8(gaussian(24, 64))

    def linear(x):
        a, a_scale = quantize_mxfp8(x)
        return scaled_mm_mxfp8(a, codes, a_scale, scale) + dequantize_mxfp8(a, a_scale).sum()

    x = torch.randn(5, 64)

    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))
