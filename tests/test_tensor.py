"""QuantizedTensor against the tensor it stands for, in every registered format."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import CheckpointError, PartsError, UnsupportedError
from lowbit.formats.parts import raw_bytes
from lowbit.tensor import LowbitFallbackWarning
from tests.support import gaussian, sqnr
from tests.support.specs import ALL_SPECS, weight_shape

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
SPEC = "fp8_e4m3(granularity=row)"


def _weight(spec=SPEC, dtype=torch.float32):
    n, k = weight_shape(lowbit.parse_spec(spec))
    return QuantizedTensor.quantize(gaussian(n, k, seed=1).to(dtype), spec)


def _close(actual, expected, decibels=100.0):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert sqnr(expected, actual) > decibels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ALL_SPECS)
def test_linear_takes_every_input_shape_in_every_grad_mode(spec, mode):
    """F.linear, and the aten ops it becomes, agree for 1-D to 4-D inputs, with and without bias."""
    w = _weight(spec)
    n, k = w.shape
    for shape in [(k,), (1, k), (5, k), (2, 3, k), (2, 2, 3, k), (0, k)]:
        for bias in (None, torch.randn(n)):
            x = torch.randn(shape)
            with MODES[mode]():
                expected = lowbit.ops.linear(x, w.part_list, bias, w.spec)
                short = F.linear(x, w, bias)
                with torch._C.DisableTorchFunctionSubclass():
                    aten = F.linear(x, w, bias)
            assert torch.equal(short, expected)
            assert aten.shape == expected.shape
            assert x.numel() == 0 or sqnr(expected, aten) > 90


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_linear_is_near_the_float64_product_of_the_dequantized_weight(spec):
    """The reference linear is the product with dequantize(), up to the quantization of activations if there is one."""
    w = _weight(spec)
    x = torch.randn(7, w.shape[1])
    if w.format.config().get("act_unsigned"):
        x = F.gelu(x)  # what such a layer is made for: nothing below -0.17
    expected = x.double() @ w.dequantize().double().t()
    if (share := w.format.bias_share(w.parts)) is not None:
        expected = expected + share  # a stored bias would contain the negative of this

    decibels = 120.0
    if w.format.rounds_input:
        four_bits = w.format.name == "svdquant_w4a4" or w.format.config().get("linear_dtype") == "int4"
        three_bits_of_mantissa = 30.0  # what rounding to e4m3 leaves of any numbers
        decibels = 12.0 if four_bits else three_bits_of_mantissa if w.format.name == "fp8_e4m3" else 35.0
    _close(F.linear(x, w).double(), expected, decibels)


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_gradients_reach_the_input_through_the_frozen_weight(spec):
    """The input's gradient is grad times the dequantized weight; the bias gets the summed gradient."""
    w = _weight(spec)
    x, bias = torch.randn(3, w.shape[1], requires_grad=True), torch.zeros(w.shape[0], requires_grad=True)
    grad = torch.randn(3, w.shape[0])

    F.linear(x, w, bias).backward(grad)

    _close(x.grad, grad @ w.dequantize())
    _close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_compiles_without_graph_breaks(spec):
    """torch.compile(fullgraph=True) of a linear gives the eager result, with gradients too."""
    layer = torch.nn.Linear(*reversed(weight_shape(lowbit.parse_spec(spec))))
    layer.weight = torch.nn.Parameter(_weight(spec), requires_grad=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)

    for mode in MODES.values():
        x = torch.randn(3, layer.in_features)
        with mode():
            _close(compiled(x), layer(x), 90.0)

    x, y = (torch.randn(2, 3, layer.in_features, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    compiled(x).sum().backward()
    layer(y).sum().backward()
    _close(x.grad, y.grad)
    torch.compiler.reset()


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_survives_deepcopy_pickle_and_load_state_dict(spec):
    """deepcopy, torch.save with weights_only, and load_state_dict give the same parts, as parameters."""
    layer = torch.nn.Linear(*reversed(weight_shape(lowbit.parse_spec(spec))))
    layer.weight = torch.nn.Parameter(_weight(spec), requires_grad=False)

    copied = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for part in copied.weight.part_list:
        raw_bytes(part).zero_()
    copied.load_state_dict(loaded)

    assert isinstance(copied.weight, torch.nn.Parameter)
    assert not copied.weight.requires_grad
    assert torch.equal(copied.weight, layer.weight)
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False).weight, layer.weight)


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_rows_can_be_cut_joined_and_picked(spec):
    """slice, narrow, split, chunk, select, index by row and cat along N equal the same on the dequantized weight."""
    w = _weight(spec)
    d = w.dequantize()
    # A rotation or a low-rank branch is a matrix product, whose last bit depends on its size.
    exact = not w.format.config().get("rotation") and "svdquant" not in spec

    def check(mine, theirs):
        assert isinstance(mine, QuantizedTensor)
        assert mine.shape == theirs.shape
        assert torch.equal(mine.dequantize(), theirs) if exact else sqnr(theirs, mine.dequantize()) > 120

    for cut in (slice(0, 16), slice(5, 20), slice(None, None, 3), slice(7, 8)):
        check(w[cut], d[cut])
    check(w.narrow(0, 3, 4), d.narrow(0, 3, 4))
    check(w[5], d[5])
    for mine, theirs in zip(w.split([8, 40]), d.split([8, 40]), strict=True):
        check(mine, theirs)
    for mine, theirs in zip(w.chunk(5), d.chunk(5), strict=True):
        check(mine, theirs)
    if w.format.row_multiple == 1:
        joined = torch.cat([w[:10], w[10:]])
        check(joined, d)
        assert torch.equal(F.linear(torch.ones(1, w.shape[1]), joined), F.linear(torch.ones(1, w.shape[1]), w))


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_to_changes_the_dtype_of_results_and_never_the_payload(spec):
    """`.to(dtype)`, `.half()` and module.to keep every part's bytes and change what comes out."""
    layer = torch.nn.Linear(*reversed(weight_shape(lowbit.parse_spec(spec))))
    layer.weight = torch.nn.Parameter(_weight(spec), requires_grad=False)
    before = [part.clone() for part in layer.weight.part_list]

    layer.to(torch.bfloat16)

    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.dequantize().dtype == torch.bfloat16
    assert layer(torch.randn(2, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for old, new in zip(before, layer.weight.part_list, strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(raw_bytes(old), raw_bytes(new))
    assert layer.weight.half().dtype == torch.float16
    assert layer.weight.to("meta").device.type == "meta"


def test_products_of_all_sides_and_transpositions():
    """mm, matmul, t and @ with the weight left or right, plain or transposed, without dequantizing it."""
    w = _weight()
    d, (n, k) = w.dequantize(), w.shape
    before = lowbit.fallbacks()

    for mine, theirs in [
        (torch.mm(x := torch.randn(5, k), w.t()), x @ d.t()),
        (torch.randn(2, 3, k).mul(0).add(1) @ w.T, torch.ones(2, 3, k) @ d.T),
        (w @ x.t(), d @ x.t()),
        (torch.ones(5, n) @ w, torch.ones(5, n) @ d),
        (w.transpose(0, 1) @ torch.ones(n, 4), d.t() @ torch.ones(n, 4)),
        (torch.matmul(torch.ones(k), w.t()), torch.ones(k) @ d.t()),
    ]:
        _close(mine, theirs)

    assert lowbit.fallbacks() == before


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 1), (0.5, 2), (1, -1), (0, 0.25)])
@pytest.mark.parametrize("bias_shape", ["row", "matrix", "scalar"])
def test_addmm_honours_alpha_beta_and_any_bias_shape(beta, alpha, bias_shape):
    """addmm is beta * bias + alpha * x @ w.T; with beta 0 even a NaN bias does not count."""
    w = _weight()
    x, d = torch.randn(5, w.shape[1]), w.dequantize()
    shape = {"row": (w.shape[0],), "matrix": (5, w.shape[0]), "scalar": (1,)}[bias_shape]
    bias = torch.full(shape, float("nan")) if beta == 0 else torch.randn(shape)

    _close(torch.addmm(bias, x, w.t(), beta=beta, alpha=alpha), torch.addmm(bias, x, d.t(), beta=beta, alpha=alpha))


def test_a_bank_of_weights_is_viewed_cut_and_multiplied():
    """A view [E, N, K] selects one expert, and bmm with its transpose multiplies each by its own."""
    w = _weight()
    bank, d = w.view(4, 12, w.shape[1]), w.dequantize().view(4, 12, w.shape[1])
    x = torch.randn(4, 7, w.shape[1])

    assert torch.equal(bank[2].dequantize(), d[2])
    assert torch.equal(bank[1:3].dequantize(), d[1:3])
    _close(torch.bmm(x, bank.transpose(1, 2)), torch.bmm(x, d.transpose(1, 2)))
    _close(x @ bank.mT, x @ d.mT)
    assert torch.equal(bank.reshape(48, -1).dequantize(), w.dequantize())


@pytest.mark.parametrize("spec", [s for s in ALL_SPECS if lowbit.parse_spec(s).supports_embedding])
def test_embedding_decodes_only_the_rows_it_looks_up(spec):
    """F.embedding and nn.Embedding give the dequantized rows, in any index shape, in every grad mode."""
    w = _weight(spec)
    table = torch.nn.Embedding(*w.shape)
    table.weight = torch.nn.Parameter(w, requires_grad=False)
    indices = torch.tensor([[0, 5], [47, 5]])

    for mode in MODES.values():
        with mode():
            assert torch.equal(table(indices), w.dequantize()[indices])
            with torch._C.DisableTorchFunctionSubclass():
                assert torch.equal(table(indices), w.dequantize()[indices])


def test_other_memory_operations():
    """clone, detach, contiguous, empty_like, new_zeros, copy_ and equal keep the class and its meaning."""
    w = _weight()

    clone = w.clone()
    assert torch.equal(clone, w)
    clone.qdata.view(torch.uint8).zero_()
    assert not torch.equal(clone, w)
    clone.copy_(w)
    assert torch.equal(clone, w)
    assert w.detach().qdata is w.qdata
    assert isinstance(w.contiguous(), QuantizedTensor)
    assert torch.empty_like(w).shape == w.shape
    assert torch.equal(w.new_zeros(w.shape).dequantize(), torch.zeros(w.shape))
    assert type(w.new_empty((3,))) is torch.Tensor
    plain = torch.empty(w.shape)
    assert torch.equal(plain.copy_(w), w.dequantize())
    requantized = torch.empty_like(w).copy_(w.dequantize())
    assert torch.equal(requantized.dequantize(), w.dequantize())


def test_copying_between_formats_is_refused_with_the_remedy():
    """copy_ never relabels codes of one format as another's."""
    with pytest.raises(UnsupportedError, match="assign it instead"):
        _weight(SPEC).copy_(_weight("fp8_e5m2"))


def test_writing_into_a_quantized_weight_is_refused():
    """An in-place op that would be lost in a temporary raises and points to merge."""
    with pytest.raises(UnsupportedError, match=r"QuantizedTensor\.merge"):
        _weight().add_(1)


def test_an_op_without_handler_dequantizes_counts_and_warns_once():
    """The fallback is visible: one warning an op, and a counter."""
    w = _weight()
    name = "aten.sin.default"
    before = lowbit.fallbacks().get(name, 0)

    with pytest.warns(LowbitFallbackWarning, match=name):
        result = torch.sin(w)
    torch.sin(w)

    assert torch.equal(result, torch.sin(w.dequantize()))
    assert lowbit.fallbacks()[name] == before + 2


def test_a_small_update_survives_a_stochastic_merge():
    """Merging a delta of a twentieth of a step keeps it on average, where rounding to nearest loses it."""
    w = QuantizedTensor.quantize(gaussian(256, 256, seed=3), "fp8_e4m3(granularity=row)")
    delta = torch.full(w.shape, 0.002)

    kept = (w.merge(delta, seed=1).dequantize() - w.dequantize()).mean() / 0.002
    lost = (w.merge(delta, seed=None).dequantize() - w.dequantize()).mean() / 0.002

    assert 0.9 < kept < 1.1
    assert lost < 0.5


def test_from_parts_checks_before_wrapping():
    """A misshapen part is one error that names the layer, what was found and what was expected."""
    parts = _weight().parts
    parts["scale"] = parts["scale"][:-1]

    with pytest.raises(PartsError, match=r"blocks\.3\.fc: scale has shape \[47, 1\], expected \[48, 1\]"):
        QuantizedTensor.from_parts(parts, SPEC, (48, 40), torch.bfloat16, where="blocks.3.fc")


def test_safetensors_does_not_write_garbage():
    """Handing the wrapper itself to safetensors fails; its parts are what is saved."""
    import safetensors.torch

    with pytest.raises(CheckpointError, match=r"lowbit\.save\(module"):
        safetensors.torch.save({"w": _weight()})
    saved = safetensors.torch.save(_weight().parts)
    assert torch.equal(safetensors.torch.load(saved)["scale"], _weight().scale)


def test_autocast_decides_the_compute_dtype():
    """Under autocast the quantized linear computes in the autocast dtype, as a plain one does."""
    w = _weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(2, w.shape[1]), w).dtype == torch.bfloat16
