"""The named nvfp4 ops: contracts, oracles, errors, tracing."""

import pytest
import torch
from torch.library import opcheck

import lowbit
from lowbit.errors import FormatError, PartsError, WeightError
from lowbit.layouts.scale_128x4 import swizzle, swizzled_shape, unswizzle
from lowbit.numerics.packing import swap_nibbles
from lowbit.ops import dequantize_nvfp4, quantize_nvfp4, scaled_mm_nvfp4
from tests.support import gaussian, sqnr


def _scale(x):
    return x.float().abs().amax() / 2688 if x.numel() else torch.ones(())


def _operands(m, n, k):
    """Two quantized matrices: their codes, tensor scales, block scales and values in float64."""
    found = []
    for rows, seed in ((m, 1), (n, 2)):
        x = gaussian(rows, k, seed=seed)
        codes, scale = quantize_nvfp4(x, _scale(x))
        found.append((codes, _scale(x), scale, dequantize_nvfp4(codes, _scale(x), scale, torch.float64)))
    (a, ta, sa, va), (b, tb, sb, vb) = found
    return (a, b, ta, tb, sa, sb), va, vb


def test_golden_bytes():
    """The row 0..31 has the bytes and scales of comfy-kitchen, the even column in the high nibble."""
    codes, scale = quantize_nvfp4(torch.arange(32.0).expand(16, 32), torch.tensor(31.0) / 2688)

    assert codes[0].numpy().tobytes().hex(" ", 1) == "01 22 34 45 55 66 67 77 55 56 66 66 66 77 77 77"
    assert unswizzle(scale, 16, 2)[0].float().tolist() == [224.0, 448.0]


@pytest.mark.parametrize(("m", "k"), [(1, 16), (16, 64), (17, 48), (129, 128), (0, 32)])
@pytest.mark.parametrize("hi_first", [True, False])
def test_codes_and_scales_are_the_format_s(m, k, hi_first):
    """The op and the format `nvfp4` make the same codes and scales, in the orders that each promises."""
    x = gaussian(m, k)
    parts = lowbit.parse_spec("nvfp4").quantize(x)

    codes, scale = quantize_nvfp4(x, parts["global_scale"], hi_first=hi_first)

    assert torch.equal(swap_nibbles(codes) if hi_first else codes, parts["qdata"])
    assert torch.equal(scale.view(torch.uint8), swizzle(parts["scale"]).view(torch.uint8))
    assert tuple(scale.shape) == swizzled_shape(m, k // 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(129, 128), (33, 65), (65, 96), (1, 1)])
def test_padding_is_that_of_comfy_kitchen(shape, dtype):
    """With pad_16x, codes, scales and shapes equal comfy-kitchen's eager op bit for bit, for every input dtype."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = gaussian(*shape, dtype=dtype)

    codes, scale = quantize_nvfp4(x, _scale(x), pad_16x=True)
    expected, blocked = kitchen.quantize_nvfp4(x, _scale(x), pad_16x=True)

    assert torch.equal(codes, expected)
    assert torch.equal(scale.view(torch.uint8), blocked.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantize_rounds_once(dtype):
    """Values are the float32 product rounded once to the result's dtype; in float32 they equal comfy-kitchen's bits."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = gaussian(33, 64)
    codes, scale = quantize_nvfp4(x, _scale(x))
    exact = kitchen.dequantize_nvfp4(codes, _scale(x), scale, torch.float32)

    back = dequantize_nvfp4(codes, _scale(x), scale, dtype)

    assert torch.equal(back, exact.to(dtype))
    assert torch.equal(dequantize_nvfp4(swap_nibbles(codes), _scale(x), scale, dtype, hi_first=False), back)


def test_a_tensor_scale_of_zero_gives_zeros():
    """No NaN comes of a tensor scale of 0, with a zero or any other x."""
    for x in (torch.zeros(4, 32), gaussian(4, 32)):
        codes, scale = quantize_nvfp4(x, torch.zeros(1))

        assert not codes.any()
        assert not scale.view(torch.uint8).any()
        assert not dequantize_nvfp4(codes, torch.zeros(1), scale).any()


def test_nan_and_infinity_in_x():
    """A NaN makes its group NaN and no other; infinity saturates."""
    x = gaussian(2, 32)
    x[0, 3], x[1, 20] = float("nan"), float("inf")
    codes, scale = quantize_nvfp4(x, torch.tensor(0.01))

    back = dequantize_nvfp4(codes, torch.tensor(0.01), scale, torch.float32)

    assert back[0, :16].isnan().all()
    assert torch.isfinite(back.flatten()[16:]).all()
    assert back[1, 20] == back[1].max()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (17, 33, 48), (5, 130, 256), (0, 3, 32)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_that_of_the_decoded_operands(m, n, k, with_bias):
    """scaled_mm equals the float64 product of the decoded operands, plus bias, to float32 accuracy."""
    operands, va, vb = _operands(m, n, k)
    bias = torch.randn(n) if with_bias else None

    out = scaled_mm_nvfp4(*operands, bias, torch.float32)

    expected = va @ vb.T + (bias.double() if with_bias else 0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)


def test_alpha_takes_the_place_of_the_tensor_scales():
    """alpha is honoured, alone: tensor scales are not applied on top of it, and bias is added after it."""
    operands, va, vb = _operands(8, 8, 64)
    scales, bias = operands[2] * operands[3], torch.randn(8)

    out = scaled_mm_nvfp4(*operands, bias, torch.float32, alpha=3 * scales.reshape(1))

    torch.testing.assert_close(out.double(), 3 * (va @ vb.T) + bias.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(dtype):
    """A half-precision result is the float32 one, cast; bfloat16 is the default."""
    operands, _, _ = _operands(8, 8, 64)
    bias = torch.randn(8, dtype=dtype)

    out = scaled_mm_nvfp4(*operands, bias, dtype)

    assert torch.equal(out, scaled_mm_nvfp4(*operands, bias.float(), torch.float32).to(dtype))
    assert scaled_mm_nvfp4(*operands).dtype == torch.bfloat16


def test_large_operands_are_decoded_in_pieces(monkeypatch):
    """The product in many pieces of both operands equals the one in a single piece."""
    operands, _, _ = _operands(40, 50, 64)
    whole = scaled_mm_nvfp4(*operands, None, torch.float32)

    monkeypatch.setattr("lowbit.backends.eager.block_scaled.DECODE_ELEMENTS", 7 * 64)

    assert sqnr(whole, scaled_mm_nvfp4(*operands, None, torch.float32)) > 110


def test_unfit_arguments_are_named():
    """Each wrong operand gives one LowbitError that says what was expected."""
    operands, _, _ = _operands(8, 8, 64)
    a, b, ta, tb, sa, sb = operands
    one = torch.ones(())

    with pytest.raises(WeightError, match=r"K = 40 is not a multiple of 16; pass pad_16x=True"):
        quantize_nvfp4(torch.randn(4, 40), one)
    with pytest.raises(WeightError, match="takes a 2-D floating-point x, not a 3-D float32"):
        quantize_nvfp4(torch.randn(2, 4, 32), one)
    with pytest.raises(WeightError, match="not a 2-D int8 tensor"):
        quantize_nvfp4(torch.zeros(4, 32, dtype=torch.int8), one)
    with pytest.raises(PartsError, match=r"per_tensor_scale is float32 \[4\], expected one float value"):
        quantize_nvfp4(torch.randn(4, 32), torch.ones(4))
    with pytest.raises(PartsError, match=r"qx is int8 \[8, 32\], expected uint8 \[rows, K / 2\]"):
        dequantize_nvfp4(a.view(torch.int8), ta, sa)
    with pytest.raises(
        PartsError, match=r"the scales of qx are float8_e4m3fn \[8, 4\], expected .* \[128, 4\], swizzled"
    ):
        dequantize_nvfp4(a, ta, unswizzle(sa, 8, 4))
    with pytest.raises(FormatError, match="output_type is int8, expected a floating-point type"):
        dequantize_nvfp4(a, ta, sa, torch.int8)
    with pytest.raises(PartsError, match="a has K = 64 and b has K = 32"):
        scaled_mm_nvfp4(a, b[:, :16].contiguous(), ta, tb, sa, sb)
    with pytest.raises(PartsError, match=r"bias has shape \[7\], expected \[8\]"):
        scaled_mm_nvfp4(*operands, torch.randn(7))
    with pytest.raises(PartsError, match=r"alpha is float32 \[2\]"):
        scaled_mm_nvfp4(*operands, alpha=torch.ones(2))


@pytest.mark.real_empty
@pytest.mark.usefixtures("_compare_float8")
def test_opcheck():
    """Schemas, fake tensors and AOT dispatch of the three ops are sound."""
    operands, _, _ = _operands(17, 8, 64)
    ops = torch.ops.lowbit

    opcheck(ops.quantize_nvfp4.default, (torch.randn(17, 40), torch.ones(()), 0.0, True, True))
    opcheck(ops.dequantize_nvfp4.default, (operands[0], operands[2], operands[4], torch.bfloat16, True))
    opcheck(ops.scaled_mm_nvfp4.default, (*operands, torch.randn(8), torch.float32, torch.ones(1)))
    opcheck(ops.scaled_mm_nvfp4.default, (*operands, None, torch.bfloat16, None))


@pytest.mark.real_empty
def test_compiles_as_one_graph():
    """A dynamically quantized linear is one graph under torch.compile, with the same result."""
    w = gaussian(24, 64)
    codes, scale = quantize_nvfp4(w, _scale(w))

    def linear(x):
        s = x.abs().amax() / 2688
        a, a_scale = quantize_nvfp4(x, s)
        return scaled_mm_nvfp4(a, codes, s, _scale(w), a_scale, scale) + dequantize_nvfp4(a, s, a_scale).sum()

    x = torch.randn(5, 64)

    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))
