"""lowbit's formats as layouts of comfy_kitchen: products in every mode, copies, and making codes again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import parse_spec
from lowbit.integrations.comfyui import is_lowbit, layout_for
from lowbit.integrations.comfyui.layout import bias_gain, parts_of
from tests.support.specs import READ_ONLY_SPECS

kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="comfy-kitchen is not installed")

N, K = 64, 256
SPECS = (
    "awq_w4a16",
    "svdquant_w4a4(rank=16)",
    "svdquant_w4a4(rank=16,act_unsigned=true)",
    "int8(granularity=row)",
    "fp8_e4m3(granularity=row)",
    "nvfp4",
    "mxfp8",
    "convrot_w4a4",
    "w4a8_codebook",
)


def _made(spec, dtype=torch.bfloat16):
    fmt = parse_spec(spec)
    weight = (0.05 * torch.randn(N, K)).to(dtype)
    parts = fmt.quantize(weight)
    return fmt, weight, parts, layout_for(fmt).wrap(parts, dtype, (N, K))


@pytest.mark.parametrize("spec", SPECS)
def test_linear_is_lowbits_own_in_every_mode(spec):
    """In inference_mode, no_grad and with gradients, 1-D to 4-D, with a bias or none: the format's own product."""
    fmt, _, parts, weight = _made(spec)
    bias = torch.randn(N).bfloat16()
    for shape in ((K,), (5, K), (2, 3, K), (2, 1, 3, K)):
        x = torch.randn(shape).bfloat16()
        for given in (bias, None):
            expected = fmt.linear(x, parts, given)
            for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
                with mode():
                    torch.testing.assert_close(F.linear(x, weight, given), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_the_input(spec):
    """The gradient of the input is that of the decoded weight; the weight itself is frozen."""
    _, _, _, weight = _made(spec, torch.float32)
    x = torch.randn(4, K, requires_grad=True)
    up = torch.randn(4, N)

    F.linear(x, torch.nn.Parameter(weight, requires_grad=False), torch.zeros(N)).backward(up)

    torch.testing.assert_close(x.grad, up @ weight.dequantize(), rtol=1e-3, atol=1e-3)


def test_products_other_than_linear():
    """mm, addmm with alpha and beta, a bias of two axes and a quantized first operand mean what they say."""
    _, _, _, weight = _made("awq_w4a16", torch.float32)
    plain, x, add = weight.dequantize(), torch.randn(3, K), torch.randn(3, N)
    with torch.no_grad():
        torch.testing.assert_close(torch.mm(x, weight.t()), x @ plain.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.mm(add, weight), add @ plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.mm(weight, x.t()), plain @ x.t(), rtol=1e-4, atol=1e-4)
        made = torch.addmm(add, x, weight.t(), beta=0.5, alpha=2.0)
        torch.testing.assert_close(made, 0.5 * add + 2 * x @ plain.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weight.t().t().dequantize(), plain)
        torch.testing.assert_close(weight.t().dequantize(), plain.t())


def test_the_layouts_name_is_the_spec_and_the_layout_is_made_once():
    """Two weights of one format share a layout class, which comfy_kitchen knows by the format's spec."""
    fmt = parse_spec("svdquant_w4a4(rank=16)")

    assert layout_for(fmt) is layout_for(parse_spec("svdquant_w4a4(rank=16)"))
    assert layout_for(fmt).NAME == "Lowbit[svdquant_w4a4(rank=16)]"
    assert kitchen.get_layout_class(layout_for(fmt).NAME) is layout_for(fmt)
    assert not layout_for(fmt).QUANTIZES_INPUT
    assert not layout_for(fmt).supports_fast_matmul()


@pytest.mark.parametrize("spec", SPECS)
def test_flattening_keeps_every_part(spec):
    """What offloading does, flatten to bytes and back, gives the same weight; every tensor is among the inner ones."""
    fmt, _, parts, weight = _made(spec)
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name).clone() for name in names}
    again = type(weight).__tensor_unflatten__(inner, context, weight.shape, weight.stride())

    assert len(names) == len(parts) + (2 if fmt.folds_bias else 0)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert is_lowbit(again)


def test_copies_and_casts_keep_codes():
    """A dtype changes what it decodes to, a clone is its own memory, copy_ takes codes and parts over."""
    _, _, parts, weight = _made("svdquant_w4a4(rank=16,act_unsigned=true)")
    other = _made("svdquant_w4a4(rank=16,act_unsigned=true)")[3]

    assert weight.to(torch.float16).dequantize().dtype == torch.float16
    assert torch.equal(weight.to(torch.float16)._qdata, parts["qdata"])
    cloned = weight.clone()
    other.copy_(weight)
    assert torch.equal(other.dequantize(), cloned.dequantize())
    other._qdata.zero_()
    assert torch.equal(cloned.dequantize(), weight.dequantize())


def test_a_weight_of_another_format_is_not_copied_in():
    """Codes of one format are not taken for those of another."""
    with pytest.raises(TypeError, match="Layout mismatch"):
        _made("awq_w4a16")[3].copy_(_made("awq_w4a16(group_size=32)")[3])


@pytest.mark.parametrize("spec", SPECS)
def test_a_small_change_survives_requantizing_with_a_seed(spec):
    """A change far below one level is there on average when it is rounded by chance, and the rest stays near."""
    _, _, _, weight = _made(spec)
    weight = weight.to(torch.float32)
    old = weight.dequantize()
    change = 2e-4 * torch.randn(N, 4) @ torch.randn(4, K)

    new = weight.requantize_from_float(old + change, scale="recalculate", stochastic_rounding=7, inplace_ops=True)

    gained = new.dequantize() - old
    assert float((gained * change).sum() / change.square().sum()) == pytest.approx(1.0, abs=0.15)
    assert new._layout_cls == weight._layout_cls


def test_requantizing_the_same_weight_changes_nothing():
    """Decoding in any dtype and quantizing again, by chance even, gives the same codes: nothing is there to round."""
    _, _, parts, weight = _made("awq_w4a16")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        taken = weight.to(dtype)
        again = taken.requantize_from_float(taken.dequantize(), scale="recalculate", stochastic_rounding=3)
        assert torch.equal(again._qdata, parts["qdata"])


def test_a_baked_weight_knows_what_its_bias_lacks():
    """With act_unsigned the product with the stored bias is right before and after a large change of the weight."""
    fmt, weight_before, parts, weight = _made("svdquant_w4a4(rank=16,act_unsigned=true)", torch.float32)
    x, true_bias = torch.rand(512, K), torch.randn(N)
    stored = true_bias - fmt.bias_share(parts)
    change = 0.2 * weight_before.abs()

    baked = weight.requantize_from_float(weight.dequantize() + change, stochastic_rounding=1)

    assert bias_gain(weight) is None
    assert float(bias_gain(baked).norm()) > 0.1
    for w in (weight, baked):
        expected = x @ w.dequantize().t() + true_bias
        mean = (F.linear(x, w, stored) - expected).mean(0)
        assert float(mean.abs().max()) < 0.02 * float(expected.std())


def test_from_float_takes_the_bias_for_a_true_one():
    """A weight made without a stored one beside it needs no share in the bias."""
    fmt = parse_spec("svdquant_w4a4(rank=16,act_unsigned=true)")
    w = 0.05 * torch.randn(N, K)
    made = kitchen.QuantizedTensor.from_float(w, layout_for(fmt).NAME)
    x, bias = torch.rand(64, K), torch.randn(N)

    difference = F.linear(x, made, bias) - (x @ made.dequantize().t() + bias)
    assert float(difference.mean(0).abs().max()) < 0.05


def test_what_is_saved_has_the_names_of_comfyui_files():
    """comfy_kitchen's own way of saving a weight gives keys that ComfyUI files have."""
    saved = _made("svdquant_w4a4(rank=16)")[3].state_dict("a.weight")
    awq = _made("awq_w4a16")[3].state_dict("a.weight")

    assert set(saved) >= {"a.weight", "a.weight_scale", "a.weight_proj_down"}
    assert set(awq) == {"a.weight", "a.weight_scale", "a.weight_zero"}


def test_what_cannot_be_made_is_refused():
    """Quantizing into a format with calibrated scales, or one that is only read, is an error that says what to do."""
    calibrated = layout_for(dataclasses.replace(parse_spec("int8"), input_scale=True))
    with pytest.raises(UnsupportedError, match="lowbit convert"):
        kitchen.QuantizedTensor.from_float(torch.randn(N, K), calibrated.NAME)
    with pytest.raises(FormatError, match="can only be read"):
        kitchen.QuantizedTensor.from_float(torch.randn(N, K), layout_for(parse_spec(READ_ONLY_SPECS[0])).NAME)


def test_parts_come_back():
    """The parts of a wrapped weight are the ones it was made of."""
    _, _, parts, weight = _made("w4a8_codebook")

    assert {name: part.data_ptr() for name, part in parts_of(weight).items()} == {
        name: part.data_ptr() for name, part in parts.items()
    }
