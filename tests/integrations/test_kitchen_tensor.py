"""QuantizedTensor of lowbit.integrations.kitchen as a tensor: moved, copied, saved, multiplied in every mode."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
from torch.nn import functional as F

import lowbit.integrations.kitchen as comfy_kitchen
from lowbit.errors import LowbitError, UnknownFormatError, UnsupportedError
from lowbit.integrations.kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    TensorCoreFP8Layout,
    dequantize_args,
    get_layout_class,
    register_layout_class,
    register_layout_op,
)
from lowbit.tensor.handlers import LowbitFallbackWarning
from tests.support.kitchen import LAYOUTS, PADDED

N, K = 48, 192


def made(case, dtype=torch.bfloat16, n=N, k=K):
    """A random weight in the layout of a case."""
    layout, options = LAYOUTS[case]
    return QuantizedTensor.from_float(torch.randn(n, k).to(dtype), layout, **options)


def gap(a, b):
    """The relative distance of two results."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("case", LAYOUTS)
def test_it_looks_like_the_tensor_it_stands_for(case):
    """Shape and dtype are the original's; the codes have their own, and padding is told from packing."""
    w = made(case)

    assert (tuple(w.shape), w.dtype) == ((N, K), torch.bfloat16)
    assert w.storage_shape == tuple(w.qdata.shape)
    assert w.nbytes == w.qdata.numel() * w.qdata.itemsize
    assert w.data_ptr() == w.qdata.data_ptr()
    assert w.is_padded == (w.padded_shape != (N, K))
    assert w.is_padded == (case == "mxfp8")
    assert w.t().is_padded == w.is_padded
    if case in PADDED:
        assert made(case, n=N - 3, k=K - 5).is_padded
    assert f"layout={w.layout_name}" in repr(w)


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("axes", [(K,), (5, K), (2, 3, K)])
def test_products_take_the_low_bit_path_in_every_mode(case, mode, axes):
    """F.linear with and without bias, mm, addmm and matmul agree with each other, without falling back."""
    w, x, bias = made(case), torch.randn(axes).bfloat16(), torch.randn(N).bfloat16()
    expected = F.linear(x.float(), w.dequantize().float())
    close = 0.2 if case in {"svdquant", "convrot_w4a4"} else 0.03  # they round the input to 4 bits

    with warnings.catch_warnings(), mode():
        warnings.simplefilter("error")
        plain, biased = F.linear(x, w), F.linear(x, w, bias)
        assert gap(plain, expected) < close
        assert gap(biased, expected + bias) < close
        assert plain.shape == expected.shape
        assert plain.dtype == torch.bfloat16
        if len(axes) > 1:
            torch.testing.assert_close(torch.matmul(x, w.t()), plain)
        if len(axes) == 2:
            assert torch.equal(torch.mm(x, w.t()), plain)
            assert torch.equal(torch.addmm(bias, x, w.t()), biased)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_any_two_layouts_multiply(left, right):
    """An input in one layout times a weight in another: theirs raises for fp8 times int8."""
    x, w = made(left, n=16), made(right)
    expected = F.linear(x.dequantize().float(), w.dequantize().float())

    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert gap(F.linear(x, w), expected) < 0.2


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("axes", [(0, K), (2, 0, K)])
def test_no_tokens_are_a_shape_like_any_other(case, axes):
    """No rows give no rows, and an input of another width is PyTorch's own error."""
    w = made(case)

    assert tuple(F.linear(torch.zeros(axes).bfloat16(), w).shape) == (*axes[:-1], N)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        F.linear(torch.zeros(2, K + 1).bfloat16(), w)


@pytest.mark.parametrize("case", LAYOUTS)
def test_addmm_reads_alpha_beta_and_any_addend(case):
    """Theirs ignores both numbers and takes no matrix as an addend."""
    w, x, addend = made(case), torch.randn(5, K).bfloat16(), torch.randn(5, N).bfloat16()
    product = torch.mm(x, w.t()).float()

    for given in (addend, addend[0], addend[:1], addend[:, :1]):
        result = torch.addmm(given, x, w.t(), beta=0.5, alpha=2)
        assert gap(result, 2 * product + 0.5 * given.float()) < 0.006
        assert gap(torch.addmm(given, x, w.t()), product + given.float()) < 0.006
    assert gap(torch.addmm(torch.full_like(addend, torch.nan), x, w.t(), beta=0), product) < 0.006


@pytest.mark.parametrize("case", LAYOUTS)
def test_gradients_reach_the_input_and_bias(case):
    """The gradient of x is that of the dequantized weight, in float32 to the last bits; the weight gets none."""
    w = made(case, torch.float32)
    x, bias = torch.randn(2, 3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    grad = torch.randn(2, 3, N)
    F.linear(x, w, bias).backward(grad)

    assert gap(x.grad, grad @ w.dequantize()) < 1e-6
    assert gap(bias.grad, grad.sum((0, 1))) < 1e-6


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_transpose_is_the_transpose(case):
    """t() decodes to the transposed weight, also when a product takes it as it lies; twice it is the weight."""
    w, x = made(case, torch.float32), torch.randn(5, N)

    assert tuple(w.t().shape) == (K, N)
    assert torch.equal(w.t().dequantize(), w.dequantize().t())
    assert torch.equal(w.t().t().dequantize(), w.dequantize())
    assert gap(torch.mm(x, w), x @ w.dequantize()) < 1e-6
    assert gap(F.linear(x, w.t()), x @ w.dequantize()) < 1e-6


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("how", ["deepcopy", "parameter", "pickle", "torch.save", "flatten", "clone", "contiguous"])
def test_copies_are_whole(case, how):
    """Every way to copy or save one gives the same values, in memory of their own; theirs cannot do four of these."""
    w = made(case)
    if how == "deepcopy":
        copied = copy.deepcopy(w)
    elif how == "parameter":
        copied = copy.deepcopy(torch.nn.Parameter(w, requires_grad=False))
        assert isinstance(copied, torch.nn.Parameter)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(w))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(w, file)
        file.seek(0)
        copied = torch.load(file, weights_only=True)
    elif how == "flatten":
        names, context = w.__tensor_flatten__()
        inner = {name: getattr(w, name).clone() for name in names}
        copied = QuantizedTensor.__tensor_unflatten__(inner, context, None, None)
    else:
        copied = getattr(w, how)().clone()

    assert isinstance(copied, QuantizedTensor)
    assert torch.equal(copied.dequantize(), w.dequantize())
    assert copied.data_ptr() != w.data_ptr()
    assert copied.params.scale.data_ptr() != w.params.scale.data_ptr()


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_dtype_is_only_what_it_is_said_to_have_been(case):
    """to(dtype) leaves codes alone and decodes to that dtype; to the same device and dtype it is the same tensor."""
    w = made(case)
    wide = w.to(torch.float32)

    assert wide.dtype == wide.dequantize().dtype == torch.float32
    assert torch.equal(wide.dequantize().bfloat16(), w.dequantize())
    assert w.to(torch.bfloat16) is w
    assert w.to("cpu", torch.float16).dtype == torch.float16
    assert torch.empty_like(w, dtype=torch.float32).dtype == torch.float32
    assert w.to("meta").device.type == "meta"


def test_a_module_moves_saves_and_loads_one():
    """nn.Module.to, state_dict and load_state_dict work with a quantized parameter, into a plain one as well."""
    linear, plain = torch.nn.Linear(K, N, bias=False), torch.nn.Linear(K, N, bias=False)
    other = torch.nn.Parameter(made("nvfp4"), requires_grad=False)
    linear.weight = torch.nn.Parameter(made("nvfp4"), requires_grad=False)
    changed = copy.deepcopy(linear).to(torch.float32)
    changed.weight.copy_(other)
    linear.load_state_dict(changed.state_dict())
    plain.load_state_dict(linear.state_dict())

    assert torch.equal(linear.weight.dequantize(), other.dequantize())
    assert linear.weight.dtype == torch.bfloat16  # it keeps its own
    assert torch.equal(plain.weight, other.dequantize().float())


def test_writing_through_a_detached_alias_reaches_the_scales():
    """`.data` and detach() share codes and scales; theirs copies the scales, so that the two come apart."""
    w, other = made("int8_rows"), made("int8_rows")
    w.detach().copy_(other)

    assert torch.equal(w.dequantize(), other.dequantize())


def test_copying_checks_the_kind():
    """A float tensor, another layout and another shape are refused by name."""
    w = made("fp8_e4m3")

    with pytest.raises(TypeError, match="Cannot copy Tensor to QuantizedTensor"):
        w.copy_(torch.randn(N, K))
    with pytest.raises(TypeError, match="Layout mismatch: TensorCoreFP8Layout vs TensorCoreMXFP8Layout"):
        w.copy_(made("mxfp8"))
    with pytest.raises(LowbitError, match="does not have the shape"):
        w.copy_(made("fp8_e4m3", n=1))


def test_what_has_no_handler_warns_once_and_never_loses_a_write():
    """An op without a handler dequantizes and says so; one that would write into the codes is refused."""
    w = made("w4a8")

    with pytest.warns(LowbitFallbackWarning, match=r"aten\.sub\.Tensor has no low-bit implementation for AsymW4A8"):
        result = w - 1
    assert torch.equal(result, w.dequantize() - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = w - 2
    with pytest.raises(UnsupportedError, match="would write into QuantizedTensor"):
        w.add_(1)
    assert torch.equal(dequantize_args([{"a": (w, 1)}])[0]["a"][0], w.dequantize())


def test_safetensors_is_refused_rather_than_given_another_s_memory():
    """Saving the tensor itself would read beyond its codes (theirs does); what its state_dict holds is saved."""
    import safetensors.torch

    with pytest.raises(LowbitError, match="save the tensors of its state_dict"):
        safetensors.torch.save({"w": made("int8")})
    saved = safetensors.torch.load(safetensors.torch.save(made("int8").state_dict("layer.weight")))
    assert saved.keys() == {"layer.weight", "layer.weight_scale"}


def test_fp8_takes_views_of_any_shape():
    """Codes of one element each follow view, reshape and a linear of more than two axes on both sides."""
    w, x = made("fp8_e4m3"), QuantizedTensor.from_float(torch.randn(2, 3, K).bfloat16(), "TensorCoreFP8Layout")

    assert tuple(w.view(N // 2, -1).shape) == (N // 2, 2 * K)
    assert torch.equal(w.reshape(-1, 3).dequantize(), w.dequantize().reshape(-1, 3))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            result = F.linear(x, w)
        assert tuple(result.shape) == (2, 3, N)
        assert gap(result, F.linear(x.dequantize().float(), w.dequantize().float())) < 0.006


def test_a_program_s_own_layout_is_one_of_the_family():
    """A registered subclass inherits handlers, keeps its name through views, and is listed in the error for others."""

    class Doubled(TensorCoreFP8Layout):
        """fp8 whose values count twice."""

        @classmethod
        def dequantize(cls, qdata, params):
            return 2 * super().dequantize(qdata, params)

    register_layout_class("DoubledForATest", Doubled)
    w = QuantizedTensor.from_float(torch.randn(N, K), "DoubledForATest")

    assert get_layout_class("DoubledForATest") is Doubled
    assert w.t().layout_cls is Doubled
    assert QuantizedTensor.from_float(torch.randn(N, K), Doubled).layout_name == "DoubledForATest"  # as the README does
    assert w.view(-1).layout_name == "DoubledForATest"
    with pytest.raises(UnknownFormatError, match=r"known formats: .*DoubledForATest") as caught:
        QuantizedTensor.from_float(torch.randn(N, K), "TensorCoreFP9Layout")
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)


def test_a_layout_from_scratch_works_with_its_own_handlers():
    """The base classes carry a layout that knows nothing of ours, as ComfyUI registers its own."""

    class Signs(QuantizedLayout):
        """One sign a value."""

        @dataclasses.dataclass(frozen=True)
        class Params(BaseLayoutParams):
            extra: torch.Tensor | None = None

        @classmethod
        def quantize(cls, tensor, **kwargs):
            params = cls.Params(tensor.abs().mean(), tensor.dtype, tuple(tensor.shape))
            return tensor.sign().to(torch.int8), params

        @classmethod
        def dequantize(cls, qdata, params):
            return (qdata.float() * params.scale).to(params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return (qtensor.qdata,)

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            return {"": qdata, "_scale": params.scale}

    register_layout_class("SignsForATest", Signs)

    @register_layout_op(torch.ops.aten.neg.default, Signs)
    def negated(first, args, kwargs):
        return first.copy_with(qdata=-first.qdata)

    w = QuantizedTensor.from_float(torch.randn(N, K), "SignsForATest")

    assert torch.equal((-w).dequantize(), -w.dequantize())
    assert torch.equal(w.clone().to(torch.float64).dequantize(), w.dequantize().double())
    assert list(w.state_dict("x")) == ["x", "x_scale"]
    assert w.linear_input_act(torch.randn(2, K)) is NotImplemented
    assert Signs.supports_fast_matmul()
    assert Signs.get_requirements()["layout"] == "Signs"
    assert w.optimize_for_gemv(torch.empty(0)) is w


@pytest.mark.parametrize(
    ("case", "options", "complaint"),
    [
        ("nvfp4", {"scale": "max"}, 'a number, a tensor of one value, None or "recalculate"'),
        ("int8", {"convrot": True, "is_weight": False}, "convrot is only supported when is_weight is True"),
        ("int8", {"convrot": True}, "convrot is only supported when per_channel is True"),
        ("int8_convrot", {"convrot_groupsize": 256}, "192 not divisible by group_size 256"),
        ("convrot_w4a4", {"convrot_groupsize": 256}, "192 not divisible by convrot_groupsize 256"),
        ("convrot_w4a4", {"quant_group_size": 32}, "quant_group_size is 32, expected 64"),
        ("convrot_w4a4", {"linear_dtype": "int2"}, "linear_dtype must be 'int4' or 'int8'"),
        ("w4a8", {"group_size": 12}, "group_size is 12"),
        ("w4a8", {"bits": 6, "symmetric": False}, "6-bit storage is symmetric only"),
        ("w4a8", {"scale_dtype": torch.float16}, "scale_dtype must be float32 or float8_e4m3fn"),
        ("svdquant", {"rank": 0}, "rank is 0"),
        ("awq", {"group_size": 36}, "not a multiple of the group size 36"),
    ],
)
def test_options_that_cannot_be_are_one_clear_error(case, options, complaint):
    """Wrong options raise a ValueError of lowbit that names the option and what is expected."""
    layout, usual = LAYOUTS[case]

    with pytest.raises(LowbitError, match=complaint) as caught:
        QuantizedTensor.from_float(torch.randn(N, K), layout, **{**usual, **options})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("case", ["nvfp4", "mxfp8"])
def test_block_scaled_layouts_take_matrices_only(case):
    """Another number of axes is refused by name."""
    with pytest.raises(ValueError, match="requires 2D tensor, got 3D"):
        made(case).from_float(torch.randn(2, 3, 32), LAYOUTS[case][0])


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_traced_linear_is_the_eager_one(case):
    """torch.compile(fullgraph=True) traces through every layout; theirs breaks at two."""
    torch._dynamo.reset()
    w, x = made(case), torch.randn(3, K).bfloat16()
    compiled = torch.compile(F.linear, backend="aot_eager", fullgraph=True)

    assert torch.equal(compiled(x, w), F.linear(x, w))


def test_it_is_reached_as_an_attribute():
    """Programs say comfy_kitchen.tensor.QuantizedTensor."""
    assert comfy_kitchen.tensor.QuantizedTensor is QuantizedTensor
