"""Convolutions with a quantized kernel: the same result as with the decoded kernel, in every mode and shape."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import UnsupportedError, WeightError
from lowbit.formats import formats, parse_spec
from lowbit.tensor_ops import convolutions
from tests.support import sqnr
from tests.support.specs import ALL_SPECS

CONVOLUTIONS = [
    pytest.param(lambda: nn.Conv1d(16, 12, 4, stride=2, padding=3), (2, 16, 19), id="1d"),
    pytest.param(lambda: nn.Conv2d(16, 12, 3, padding=1), (2, 16, 7, 9), id="2d"),
    pytest.param(lambda: nn.Conv2d(16, 12, (3, 1), padding="same", bias=False), (2, 16, 7, 9), id="same"),
    pytest.param(lambda: nn.Conv2d(16, 12, 3, padding=1, padding_mode="reflect"), (2, 16, 7, 9), id="reflect"),
    pytest.param(lambda: nn.Conv2d(16, 12, 2, stride=2, dilation=2, groups=4), (2, 16, 7, 9), id="grouped"),
    pytest.param(lambda: nn.Conv2d(16, 32, 3, groups=16), (2, 16, 7, 9), id="depthwise"),
    pytest.param(lambda: nn.Conv2d(16, 12, 1), (16, 7, 9), id="unbatched"),
    pytest.param(lambda: nn.Conv3d(8, 12, (1, 2, 2), stride=(1, 2, 2)), (1, 8, 3, 4, 6), id="3d"),
]


def _pair(make, spec):
    """A quantized convolution, and a plain one with what its kernel decodes to."""
    layer = make()
    lowbit.quantize_(layer, {"": spec})
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(layer.weight.dequantize())
    return layer, plain


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS)
@pytest.mark.parametrize("elements", [convolutions.DECODE_ELEMENTS, 300, 40], ids=["whole", "pieces", "rows"])
def test_convolution_is_that_of_the_decoded_kernel(make, shape, elements, monkeypatch):
    """Output and gradients equal those of the decoded kernel, decoded at once or in pieces; nothing falls back."""
    monkeypatch.setattr(convolutions, "DECODE_ELEMENTS", elements)
    layer, plain = _pair(make, "int8(granularity=block,block_size=4x8)")
    before = lowbit.fallbacks()
    x, y = torch.randn(shape).requires_grad_(), torch.randn(shape)
    y = x.detach().clone().requires_grad_()

    out, expected = layer(x), plain(y)
    weights = torch.randn_like(expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()

    assert isinstance(layer.weight, QuantizedTensor)
    assert layer.weight.shape == plain.weight.shape
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(x), expected)
    assert lowbit.fallbacks() == before


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_every_format_holds_a_kernel_or_says_why_not(spec):
    """A kernel of 64 * 3 * 3 columns is quantized as well as a matrix, or the layer is kept with the reason."""
    layer = nn.Conv2d(64, 48, 3)
    nn.init.normal_(layer.weight)
    plain, x = copy.deepcopy(layer), torch.randn(1, 64, 5, 5)

    (change,) = lowbit.quantize_(layer, spec)

    if change.format is None:
        assert parse_spec(spec).folds_bias or "[48, 576]" in change.why
        return
    golden = formats()[change.format.name].golden_sqnr[spec]
    assert sqnr(plain.weight, layer.weight.dequantize()) > golden - 1
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight.dequantize(), layer.bias))


def test_low_precision_inputs_and_autocast():
    """The result has the input's dtype, whatever the kernel's; autocast casts the input, not the kernel."""
    layer, plain = _pair(lambda: nn.Conv2d(16, 12, 3), "fp8_e4m3(granularity=row)")
    x = torch.randn(2, 16, 6, 6)
    expected = plain.bfloat16()(x.bfloat16())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x)

    torch.testing.assert_close(cast, expected)
    torch.testing.assert_close(layer(x.bfloat16()), expected)
    assert layer.weight.dtype == torch.float32


def test_gradients_in_pieces_are_summed_in_float32(monkeypatch):
    """In bfloat16, pieces of the kernel add to the input's gradient without rounding in between."""
    layer, plain = _pair(lambda: nn.Conv2d(16, 64, 3), "int8(activations=none)")
    x = torch.randn(1, 16, 6, 6, dtype=torch.bfloat16)
    grad = torch.randn(1, 64, 4, 4, dtype=torch.bfloat16)
    exact = torch.nn.grad.conv2d_input(x.shape, plain.weight.detach().bfloat16().double(), grad.double())
    monkeypatch.setattr(convolutions, "DECODE_ELEMENTS", 16 * 9)

    x.requires_grad_()
    layer(x).backward(grad)

    assert x.grad.dtype == torch.bfloat16
    assert sqnr(exact, x.grad.double()) > 48  # one rounding to 8 bits of mantissa


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_convolution_compiles_whole():
    """torch.compile(fullgraph=True) gives the eager result, forward and backward."""
    layer, _ = _pair(lambda: nn.Conv2d(8, 12, 3, groups=2), "awq_w4a16(group_size=36)")
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    expected = layer(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)

    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)

    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, wanted)


def test_a_kernel_is_moved_copied_cut_and_joined_like_a_matrix():
    """Copies, casts, memory formats, pickles, output channels and joins keep the kernel's shape and values."""
    layer, _ = _pair(lambda: nn.Conv2d(8, 12, 3), "nvfp4")
    w, before = layer.weight, lowbit.fallbacks()
    whole = w.dequantize()
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)

    copies = [
        copy.deepcopy(w),
        w.to(memory_format=torch.channels_last),
        torch.load(file, weights_only=True),
        torch.cat(w.split(5)),
        w.view(12, 72).view(12, 8, 3, 3),
    ]

    assert all(isinstance(c, QuantizedTensor) and torch.equal(c.dequantize(), whole) for c in copies)
    assert w.bfloat16().shape == w.shape
    assert torch.equal(w[2:7].dequantize(), whole[2:7])
    assert torch.equal(w[3].dequantize(), whole[3])
    assert torch.equal(w.index_select(0, torch.tensor([5, 1])).dequantize(), whole[[5, 1]])
    assert lowbit.fallbacks() == before
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dequantize(), whole)


def test_merging_an_update_keeps_the_shape_and_takes_the_update():
    """`merge` on a kernel rounds along its matrix, and what it gives is near the sum."""
    layer, plain = _pair(lambda: nn.Conv2d(8, 12, 3), "int8(activations=none)")
    delta = torch.randn(12, 8, 3, 3) * 0.05

    merged = layer.weight.merge(delta, seed=None)

    assert merged.shape == layer.weight.shape
    assert merged.matrix == (12, 72)
    assert sqnr(plain.weight.detach() + delta, merged.dequantize()) > 35


def test_a_bad_input_is_refused_in_words():
    """Too few channels are an error that names the shapes, with and without groups."""
    for groups in (1, 2):
        layer, _ = _pair(lambda groups=groups: nn.Conv2d(8, 12, 3, groups=groups), "int8(activations=none)")
        with pytest.raises(UnsupportedError, match=r"\[1, 6, 5, 5\] cannot be convolved .* must have 8 channels"):
            layer(torch.randn(1, 6, 5, 5))


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_are_kept_or_refused(kind):
    """A blanket format keeps them and says why, a rule is an error, and a quantized kernel inside one is one too."""
    layer = kind(64, 64, 2)

    (change,) = lowbit.quantize_(layer, "int8(activations=none)")

    assert change.format is None
    assert change.why.startswith("a transposed convolution")
    with pytest.raises(WeightError, match="transposed convolution"):
        lowbit.quantize_(layer, {"": "int8(activations=none)"})
    quantized = QuantizedTensor.quantize(layer.weight.detach().flatten(1), "int8").view(layer.weight.shape)
    layer.weight = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(UnsupportedError, match="a transposed convolution cannot use"):
        layer(torch.randn(1, 64, *[3] * (layer.weight.dim() - 2)))


def test_shifted_activations_are_refused():
    """A format that shifts its input cannot serve a convolution, by quantize_ or by hand."""
    layer = nn.Conv2d(64, 64, 1)
    spec = "svdquant_w4a4(rank=8,act_unsigned=true)"

    (change,) = lowbit.quantize_(layer, spec)

    assert "shifts the activations" in change.why
    kernel = QuantizedTensor.quantize(layer.weight.detach().flatten(1), spec).view(64, 64, 1, 1)
    with pytest.raises(UnsupportedError, match="shifts the activations"):
        F.conv2d(torch.randn(1, 64, 3, 3), kernel)


def test_a_lazy_layer_is_kept_until_it_has_a_shape():
    """An uninitialized weight is named, not stumbled over."""
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyLinear(8))

    changes = lowbit.quantize_(model, "int8")

    assert all("no shape yet" in change.why for change in changes)
