"""The layouts of lowbit.integrations.kitchen against comfy_kitchen's: what is stored, decoded and multiplied."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.errors import LowbitError, UnsupportedError
from lowbit.formats.parts import raw_bytes
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.integrations.kitchen import tensor
from lowbit.integrations.kitchen.tensor import QuantizedTensor
from lowbit.layouts import svdquant_tiles
from tests.support import gaussian
from tests.support.kitchen import ENCODED_ALIKE, LAYOUTS

N, K = 48, 192
DTYPES = [torch.float32, torch.bfloat16]
SVDQUANT = "TensorCoreSVDQuantW4A4Layout"


@pytest.fixture(scope="module")
def theirs():
    """The tensors of the package that is being stood in for."""
    return pytest.importorskip("comfy_kitchen").tensor


def weight(dtype=torch.float32, n=N, k=K):
    """A weight with some structure."""
    return (torch.randn(n, k) * (torch.rand(k) + 0.5)).to(dtype)


def made(case, w):
    """A weight in the layout of a case."""
    layout, options = LAYOUTS[case]
    return QuantizedTensor.from_float(w, layout, **options)


def as_theirs(theirs, mine):
    """The same stored tensors in their classes."""
    fields = {field.name: getattr(mine.params, field.name) for field in dataclasses.fields(mine.params)}
    params = theirs.get_layout_class(mine.layout_name).Params(**fields)
    return theirs.QuantizedTensor(mine.qdata, mine.layout_name, params)


def in_dtype(mine, dtype):
    """The tensor with 16-bit parameters in a dtype: theirs mixes none."""
    halves = (torch.bfloat16, torch.float16)
    fields = {field.name: getattr(mine.params, field.name) for field in dataclasses.fields(mine.params)}
    wide = {k: v.to(dtype) for k, v in fields.items() if isinstance(v, torch.Tensor) and v.dtype in halves}
    return QuantizedTensor(mine.qdata, mine.layout_name, dataclasses.replace(mine.params, **wide))


def gap(a, b):
    """The relative distance of two results."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("case", ENCODED_ALIKE)
@pytest.mark.parametrize("shape", [(1, 64), (33, 128), (48, 192)])
def test_float32_weights_are_stored_alike(theirs, case, shape):
    """The saved tensors of a float32 weight have the same keys, dtypes, shapes and bits, if it is not rotated."""
    layout, options = LAYOUTS[case]
    w = weight(n=shape[0], k=shape[1])
    mine, other = made(case, w), theirs.QuantizedTensor.from_float(w, layout, **options)

    assert list(mine.state_dict("p.weight")) == list(other.state_dict("p.weight"))
    for key, part in mine.state_dict().items():
        assert part.dtype == other.state_dict()[key].dtype, key
        if not case.startswith(("int8_convrot", "convrot")):
            assert torch.equal(raw_bytes(part), raw_bytes(other.state_dict()[key])), key
        elif key:  # a rotation sums in one order or another
            torch.testing.assert_close(part, other.state_dict()[key], rtol=4e-7, atol=0)
        else:
            assert (part != other.state_dict()[key]).float().mean() < 1e-3
    assert mine.params.orig_shape == other.params.orig_shape
    assert mine.storage_shape == other.storage_shape


@pytest.mark.parametrize("case", [name for name in LAYOUTS if not name.startswith(("svdquant", "awq"))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_lose_no_more_than_theirs(theirs, case, dtype):
    """Whatever either stores decodes alike, and ours is at least as close to the weight."""
    layout, options = LAYOUTS[case]
    w = weight(dtype)
    mine, other = made(case, w), theirs.QuantizedTensor.from_float(w, layout, **options)
    back = as_theirs(theirs, mine)

    assert gap(mine.dequantize(), back.dequantize()) < (4e-7 if dtype == torch.float32 else 0.006)
    assert mine.dequantize().dtype == dtype
    assert gap(mine.dequantize(), w) <= gap(other.dequantize(), w) * 1.0001


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_that_of_theirs(theirs, case, dtype):
    """F.linear over the same stored tensors gives the same, in 16 bits up to the roundings in between."""
    mine = in_dtype(made(case, weight(dtype)), dtype)
    other = as_theirs(theirs, mine)
    x, bias = torch.rand(2, 3, K).to(dtype), torch.randn(N).to(dtype)

    with torch.inference_mode():
        result, expected = F.linear(x, mine, bias), F.linear(x, other, bias)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    if case == "convrot_w4a4_int8":  # theirs rounds the input to 4 bits on a CPU
        expected = F.linear(x, mine.dequantize(), bias)
    close = 0.01 if case == "convrot_w4a4_int8" else 1e-3 if dtype == torch.float32 else 0.05
    assert gap(result, expected) < close


@pytest.mark.parametrize("case", ["fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("with_bias", [False, True])
def test_two_quantized_operands_multiply_in_every_mode(case, mode, with_bias):
    """Both operands low-bit, rows and columns padded: the product of what they decode to, and no fallback warning."""
    w, x, bias = weight(torch.bfloat16, n=37, k=90), weight(torch.bfloat16, n=5, k=90), torch.randn(37).bfloat16()
    mine, act = made(case, w), made(case, x)
    expected = F.linear(act.dequantize().float(), mine.dequantize().float(), bias.float() if with_bias else None)

    with mode():
        result = F.linear(act, mine, bias if with_bias else None)
    assert result.dtype == torch.bfloat16
    assert gap(result, expected) < 0.006
    if not with_bias:
        assert gap(torch.mm(act, mine.t()), expected) < 0.006


@pytest.mark.parametrize("case", LAYOUTS)
def test_zeros_decode_to_zeros(case):
    """A zero weight gives zeros; theirs gives NaN for fp8 and nvfp4."""
    assert made(case, torch.zeros(N, K)).dequantize().eq(0).all()


@pytest.mark.parametrize("case", LAYOUTS)
def test_requantizing_keeps_what_the_weight_was(case):
    """A changed weight goes back into a tensor of the same options, stochastically too, as when a LoRA is baked."""
    w = weight()
    first = made(case, w)
    again = first.requantize_from_float(w * 1.01, scale="recalculate", stochastic_rounding=7, inplace_ops=True)

    assert again.layout_name == first.layout_name
    assert {k: (v.dtype, v.shape) for k, v in again.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in first.state_dict().items()
    }
    fixed = [
        f.name for f in dataclasses.fields(first.params) if not isinstance(getattr(first.params, f.name), torch.Tensor)
    ]
    assert all(getattr(again.params, name) == getattr(first.params, name) for name in fixed)
    assert gap(again.dequantize(), w) < 0.3


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_small_change_survives_stochastic_rounding(case):
    """With a seed a change below the step is kept on average, as when a LoRA is baked; the same seed, the same bits."""
    layout, options = LAYOUTS[case]
    first = QuantizedTensor.from_float(weight(), layout, **options)
    start, change = first.dequantize(), torch.randn(N, K) * 0.006
    total = torch.zeros_like(start)
    for seed in range(1, 41):
        total += first.requantize_from_float(start + change, stochastic_rounding=seed).dequantize() - start
    kept = float((total / 40 * change).sum() / change.square().sum())
    twice = [first.requantize_from_float(start + change, stochastic_rounding=3).dequantize() for _ in range(2)]

    assert 0.85 < kept < 1.15
    assert torch.equal(*twice)


def test_svdquant_tiles_decode_and_multiply_as_plain_parts():
    """The tile-packed storage gives the same bits."""
    plain = QuantizedTensor.from_float(weight(n=128), SVDQUANT, rank=8)
    names = ("scale", "smooth_factor", "proj_down", "proj_up")
    parts = {"qdata": plain.qdata, **{name: getattr(plain.params, name) for name in names}}
    tiles = svdquant_tiles.pack(SvdquantW4A4(rank=8), parts)
    params = dataclasses.replace(plain.params, **{name: tiles[name] for name in names})
    tiled, x = QuantizedTensor(tiles["qdata"], SVDQUANT, params), torch.randn(5, K)

    assert tiled.padded_shape == (128, K)
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    assert torch.equal(F.linear(x, tiled), F.linear(x, plain))


def test_svdquant_unsigned_sees_the_shift_only_in_the_4_bit_branch():
    """With act_unsigned a stored bias without the shift's share gives the true result; dequantize() has no rounding."""
    w, x, bias = weight(), F.gelu(torch.randn(64, K)), torch.randn(N)
    fmt = SvdquantW4A4(rank=8, act_unsigned=True)
    parts = fmt.quantize(w)
    stored = bias - fmt.bias_share(parts)
    params = tensor.TensorCoreSVDQuantW4A4Layout.Params(
        parts["scale"], w.dtype, (N, K), parts["proj_down"], parts["proj_up"], parts["smooth_factor"], act_unsigned=True
    )
    mine = QuantizedTensor(parts["qdata"], SVDQUANT, params)

    with use_backend("eager"):  # kernels sum in other orders
        assert torch.equal(mine.dequantize(), fmt.dequantize(parts, (N, K), w.dtype))
    assert gap(F.linear(x, mine, stored), F.linear(x, w, bias)) < 0.12
    with pytest.raises(UnsupportedError, match="keeps a share of its weight in the bias"):
        mine.requantize_from_float(w)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_and_fused_projections_equal_single_ones(unsigned, dtype):
    """Projections that share their activation side give the same results one by one, grouped and fused."""
    first = QuantizedTensor.from_float(weight(dtype), SVDQUANT, rank=8)
    weights = [first, *(first.requantize_from_float(weight(dtype, n=n)) for n in (32, 64))]
    weights = [
        QuantizedTensor(w.qdata, SVDQUANT, dataclasses.replace(w.params, act_unsigned=unsigned)) for w in weights
    ]
    biases = [torch.randn(N).to(dtype), None, torch.randn(64).to(dtype)]
    x = torch.rand(2, 3, K).to(dtype)
    single = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    grouped = tensor.svdquant_w4a4_grouped_linear(x, weights, biases)
    wide, bias, rows = tensor.svdquant_w4a4_fuse_linear_weights(weights, biases)
    fused = tensor.svdquant_w4a4_fused_grouped_linear(x, wide, bias, rows)

    assert rows == (N, 32, 64)
    for one, two, three in zip(single, grouped, fused, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_sharing_is_checked():
    """Equal values in other memory need `validate` or `trust`; other values, kinds and numbers are refused."""
    first = QuantizedTensor.from_float(weight(), SVDQUANT, rank=8)
    copied, other = first.clone(), QuantizedTensor.from_float(weight(), SVDQUANT, rank=8)
    can_share = tensor.svdquant_w4a4_can_share_quant

    assert can_share([first, first.detach()])
    assert not can_share([first, copied])
    assert can_share([first, copied], validate=True)
    assert can_share([first, copied], trust=True)
    assert not can_share([first, other], validate=True)
    assert not can_share([first, first.t()])
    assert not can_share([])
    with pytest.raises(LowbitError, match="do not share quantization parameters"):
        tensor.svdquant_w4a4_grouped_linear(torch.randn(2, K), [first, other])
    with pytest.raises(ValueError, match="2 weights but 1 biases"):
        tensor.svdquant_w4a4_grouped_linear(torch.randn(2, K), [first, first], [None])
    with pytest.raises(TypeError, match="must be a TensorCoreSVDQuantW4A4Layout"):
        tensor.svdquant_w4a4_fused_grouped_linear(torch.randn(2, K), torch.randn(2, K), None, [2])


@pytest.mark.parametrize("rotation", [False, True])
def test_int8_embedding_decodes_only_the_rows_asked_for(rotation):
    """dequantize_embedding gives those rows of dequantize()."""
    table = QuantizedTensor.from_float(
        weight(), "TensorWiseINT8Layout", per_channel=True, convrot=rotation, convrot_groupsize=64
    )
    indices = torch.tensor([[3, 0], [47, 3]])
    rows = table.layout_cls.dequantize_embedding(table.qdata, table.params, indices)

    torch.testing.assert_close(rows, table.dequantize()[indices], rtol=0, atol=1e-6)


def test_linear_input_act_is_there_for_int8_and_w4a8():
    """Layouts that can, fold an activation and a residual into the product; the others say NotImplemented."""
    x, residual, scale = torch.randn(5, 2 * K), torch.randn(5, N), torch.randn(N)
    gate, up = x.chunk(2, dim=-1)

    for case in ("int8_convrot", "w4a8"):
        w = made(case, weight())
        result = w.linear_input_act(x, None, "swiglu", residual=residual, residual_scale=scale)
        assert gap(result, residual + scale * F.linear(F.silu(gate) * up, w)) < 1e-3
        assert w.t().linear_input_act(x) is NotImplemented
    assert made("awq", weight()).linear_input_act(x) is NotImplemented
    table = made("int8", weight())
    norm, modulation = torch.rand(K), torch.randn(K)
    fused = table.layout_cls.fused_rms_modulated(gate, table, None, norm, 1e-6, modulation)
    assert gap(fused, F.linear(F.rms_norm(gate, (K,), norm, 1e-6) * (1 + modulation), table)) < 1e-3
    assert table.layout_cls.fused_rms_modulated(gate, table, None, norm, 1e-6, x) is NotImplemented


@pytest.mark.parametrize("case", ["svdquant", "awq"])
def test_what_theirs_cannot_quantize_is_quantized_here(case):
    """from_float works for the layouts whose quantize() raises there, so that a LoRA can be baked."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gap(made(case, weight()).dequantize(), weight()) > 1  # another weight: the measure can fail
        w = weight()
        assert gap(made(case, w).dequantize(), w) < 0.1


def test_a_product_rounds_once():
    """x times fp8 codes and their scale is nearer to float64 than x times the weight decoded to bfloat16."""
    x, weight = gaussian(16, 128, dtype=torch.bfloat16), gaussian(64, 128, seed=1, dtype=torch.bfloat16)
    quantized = QuantizedTensor.from_float(weight, "TensorCoreFP8Layout")
    codes, scale = tensor.TensorCoreFP8Layout.get_plain_tensors(quantized)
    exact = x.double() @ (codes.double() * scale.double()).T
    errors = [(F.linear(x, w).double() - exact).norm() for w in (quantized, quantized.dequantize())]

    assert errors[0] < 0.9 * errors[1]
