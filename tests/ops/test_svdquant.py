"""quantize_svdquant_w4a4 and scaled_mm_svdquant_w4a4: the contract of comfy-kitchen, without its traps."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from lowbit.backends.eager import svdquant as eager
from lowbit.dispatch import use_backend
from lowbit.errors import PartsError, UnsupportedError
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import svdquant_tiles
from lowbit.numerics import int4_matmul
from lowbit.numerics.int4_matmul import GELU_SHIFT, unpack_codes
from lowbit.ops import quantize_svdquant_w4a4, scaled_mm_svdquant_w4a4
from tests.support import gaussian, widened


@pytest.fixture
def kitchen():
    """The reference's eager functions."""
    return pytest.importorskip("comfy_kitchen.backends.eager.svdquant")


def layer(n=128, k=192, rank=8, dtype=torch.float32, **fields):
    """A format and the parts of a weight."""
    fmt = SvdquantW4A4(rank=rank, **fields)
    parts = fmt.quantize(gaussian(n, k, dtype=dtype))
    return fmt, widened(parts) if dtype == torch.float32 else parts


def run_layer(x, parts, bias=None, *, unsigned=False, pad_size=1):
    """The two ops one after the other, as an integration calls them."""
    shifted, raw = (x + GELU_SHIFT, x) if unsigned else (x, None)
    quantized = quantize_svdquant_w4a4(shifted, parts["smooth_factor"], parts["proj_down"], pad_size, unsigned, raw)
    return multiply(quantized, parts, bias, unsigned=unsigned)


def multiply(quantized, parts, bias=None, *, unsigned=False):
    """scaled_mm of quantized activations with the parts of a weight."""
    act, scales, low = quantized
    return scaled_mm_svdquant_w4a4(
        act, parts["qdata"], scales, parts["scale"], low, parts["proj_up"], bias, act_unsigned=unsigned
    )


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("pad_size", [1, 16, 256])
def test_quantizing_is_bit_equal_to_comfy_kitchen_on_float32(kitchen, unsigned, pad_size):
    """Codes, scales and low-rank activations of float32 rows, a zero and a tiny one included, with any padding."""
    x, smooth, down = torch.randn(37, 192), torch.rand(192) + 0.5, torch.randn(192, 8)
    x[3], x[4] = 0, x[4] * 1e-20
    x, raw = (x.abs(), x) if unsigned else (x, None)

    with use_backend("eager"):  # a compiled kernel's low-rank sums are in another order
        ours = quantize_svdquant_w4a4(x, smooth, down, pad_size, unsigned, raw)
    theirs = kitchen.quantize_svdquant_w4a4(x, smooth, down, pad_size, unsigned, raw)

    assert ours[0].shape[0] == -(-37 // pad_size) * pad_size
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_close_to_comfy_kitchen(kitchen, unsigned, dtype):
    """The same tensors give the result of the reference up to the order of summation, in bfloat16 its roundings."""
    _, parts = layer(dtype=dtype)
    x, bias = torch.rand(5, 192).to(dtype), torch.randn(128).to(dtype)
    quantized = quantize_svdquant_w4a4(x, parts["smooth_factor"], parts["proj_down"], 1, unsigned)
    names = (quantized[0], parts["qdata"], quantized[1], parts["scale"], quantized[2], parts["proj_up"])

    ours, theirs = (
        multiply(quantized, parts, bias, unsigned=unsigned),
        kitchen.scaled_mm_svdquant_w4a4(*names, bias, unsigned),
    )

    assert ours.dtype == theirs.dtype == dtype
    assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("unsigned", "low", "high"), [(False, -7, 7), (True, 0, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_keep_within_their_range(unsigned, low, high, dtype):
    """Signed codes fill [-7, 7] and never are -8; unsigned ones fill [0, 15], and what is negative becomes 0."""
    x = torch.randn(64, 128).to(dtype)
    act, _, _ = quantize_svdquant_w4a4(x, torch.ones(128).to(dtype), torch.zeros(128, 1).to(dtype), 1, unsigned)
    codes = unpack_codes(act, unsigned)

    assert (codes.min(), codes.max()) == (low, high)
    if unsigned:
        assert (codes[x < 0] == 0).all()


def test_the_low_rank_sees_its_own_input():
    """lora_x alone feeds lora_down, without smoothing or shift; x alone makes the codes."""
    x, raw, smooth, down = torch.rand(5, 128), torch.randn(5, 128), torch.rand(128) + 0.5, torch.randn(128, 4)

    with_raw = quantize_svdquant_w4a4(x, smooth, down, 1, True, raw)
    without = quantize_svdquant_w4a4(x, smooth, down, 1, True)

    assert torch.equal(with_raw[0], without[0])
    assert torch.equal(with_raw[1], without[1])
    torch.testing.assert_close(with_raw[2], raw @ down)
    torch.testing.assert_close(without[2], x @ down)


def test_padding_is_asked_for_and_zero():
    """M stays as it is by default; rows of padding have codes, scales and low-rank activations of zero."""
    x, smooth, down = torch.randn(3, 64), torch.ones(64), torch.randn(64, 2)

    assert [tuple(t.shape) for t in quantize_svdquant_w4a4(x, smooth, down)] == [(3, 32), (1, 3), (3, 2)]
    act, scales, low = quantize_svdquant_w4a4(x, smooth, down, 256)
    assert [tuple(t.shape) for t in (act, scales, low)] == [(256, 32), (1, 256), (256, 2)]
    assert not act[3:].any()
    assert not scales[:, 3:].any()
    assert not low[3:].any()
    assert torch.equal(act[:3], quantize_svdquant_w4a4(x, smooth, down)[0])


def test_a_channel_without_smoothing_is_switched_off():
    """A factor of 0 gives code 0 in its channel and leaves the others of its group alone."""
    x, down = torch.randn(3, 64), torch.zeros(64, 1)
    smooth = torch.ones(64)
    smooth[5] = 0
    x_without = x.clone()
    x_without[:, 5] = 0

    found = quantize_svdquant_w4a4(x, smooth, down)

    assert torch.equal(found[0], quantize_svdquant_w4a4(x_without, torch.ones(64), down)[0])
    assert torch.isfinite(found[1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_contract(dtype):
    """Scales have the dtype of x, low-rank activations are float32, the product has the dtype of lora_up."""
    _, parts = layer(dtype=dtype)
    act, scales, low = quantize_svdquant_w4a4(torch.randn(2, 192).to(dtype), parts["smooth_factor"], parts["proj_down"])

    assert (act.dtype, scales.dtype, low.dtype) == (torch.int8, dtype, torch.float32)
    assert multiply((act, scales, low), parts).dtype == dtype


@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiles_are_bit_equal_to_plain_parts(m, unsigned, with_bias):
    """A tile-packed weight gives the bits of the plain one."""
    fmt, parts = layer(256)
    x, bias = torch.randn(m, 192), torch.randn(256) if with_bias else None

    plain = run_layer(x, parts, bias, unsigned=unsigned)
    tiled = run_layer(x, svdquant_tiles.pack(fmt, parts), bias, unsigned=unsigned)

    assert plain.shape == (m, 256)
    assert torch.equal(tiled, plain)


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_ops_make_up_the_generic_linear(unsigned):
    """With float32 input, the two ops, the shift by the caller, and the stored bias are lowbit::linear bit for bit."""
    fmt, parts = layer(act_unsigned=unsigned)
    x, bias = F.gelu(torch.randn(5, 192)), torch.randn(128)

    with use_backend("eager"):
        assert torch.equal(run_layer(x, parts, bias, unsigned=unsigned), fmt.linear(x, parts, bias))


@pytest.mark.parametrize("tiled", [False, True])
def test_small_pieces_change_nothing(tiled, monkeypatch):
    """However little fits into a temporary, results are the same to the last bits of the low-rank product."""
    fmt, parts = layer(256)
    parts = svdquant_tiles.pack(fmt, parts) if tiled else parts
    x, bias = torch.randn(300, 192), torch.randn(256)
    whole = run_layer(x, parts, bias)
    monkeypatch.setattr(int4_matmul, "_PIECE", 1 << 10)
    monkeypatch.setattr(eager, "_PIECE", 1 << 10)

    torch.testing.assert_close(run_layer(x, parts, bias), whole, rtol=1e-5, atol=1e-5)


def test_results_are_new_tensors():
    """A second call leaves the first one's results as they were: no workspace is shared."""
    smooth, down = torch.ones(64), torch.randn(64, 2)
    first = quantize_svdquant_w4a4(torch.randn(3, 64), smooth, down)
    kept = [t.clone() for t in first]
    second = quantize_svdquant_w4a4(torch.randn(3, 64), smooth, down)

    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 3, 64)}, "x is float32"),
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, "x is int8"),
        ({"x": torch.randn(3, 65)}, "multiple of the group size 64"),
        ({"smooth": torch.ones(63)}, r"smooth has shape \[63\], expected \[64\]"),
        ({"lora_down": torch.ones(2, 64)}, "lora_down has shape"),
        ({"lora_x": torch.ones(2, 64)}, "lora_x has shape"),
        ({"pad_size": 0}, "pad_size is 0"),
    ],
)
def test_activations_that_do_not_fit_are_refused(change, message):
    """One error names the tensor and what was expected."""
    arguments = {"x": torch.randn(3, 64), "smooth": torch.ones(64), "lora_down": torch.randn(64, 2), **change}

    with pytest.raises(PartsError, match=message):
        quantize_svdquant_w4a4(**arguments)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("act", torch.zeros(3, 90, dtype=torch.int8), "act is int8"),
        ("act", torch.zeros(3, 64, dtype=torch.int8), "wgt has shape .* K differs"),
        ("wgt", torch.zeros(128, 96), "wgt is float32"),
        ("wgt", torch.zeros(128, 3, 32, dtype=torch.int8), "wgt is int8"),
        ("ascales", torch.zeros(3, 2), "ascales has shape"),
        ("wscales", torch.zeros(128, 3), "scales? has shape"),
        ("lora_act_in", torch.zeros(3, 9), "lora_act_in has shape"),
        ("lora_up", torch.zeros(8, 128), "(lora_up|proj_up|lora_act_in) has shape"),
        ("bias", torch.zeros(127), "bias has shape"),
    ],
)
def test_operands_that_do_not_fit_are_refused(name, bad, message, tiled):
    """One error names the tensor and what was expected, for both arrangements."""
    fmt, parts = layer()
    act, scales, low = quantize_svdquant_w4a4(torch.randn(3, 192), parts["smooth_factor"], parts["proj_down"])
    parts = svdquant_tiles.pack(fmt, parts) if tiled else parts
    arguments = {
        "act": act,
        "wgt": parts["qdata"],
        "ascales": scales,
        "wscales": parts["scale"],
        "lora_act_in": low,
        "lora_up": parts["proj_up"],
    }

    with pytest.raises(PartsError, match=message):
        scaled_mm_svdquant_w4a4(**{**arguments, name: bad})


def test_asking_for_a_gradient_names_the_way():
    """The ops have no gradients: backward says so, instead of leaving them out silently."""
    _, parts = layer()
    x = torch.randn(3, 192, requires_grad=True)

    with pytest.raises(UnsupportedError, match="use lowbit::linear"):
        run_layer(x, parts).sum().backward()


@pytest.mark.real_empty
@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("tiled", [False, True])
def test_opcheck(m, tiled):
    """Schema, fake tensors and AOT dispatch are sound."""
    fmt, parts = layer()
    x, smooth, down = torch.randn(m, 192), parts["smooth_factor"], parts["proj_down"]
    parts = svdquant_tiles.pack(fmt, parts) if tiled else parts
    ops = torch.ops.lowbit

    opcheck(ops.quantize_svdquant_w4a4.default, (x, smooth, down, 1, False, None))
    opcheck(ops.quantize_svdquant_w4a4.default, (x.bfloat16(), smooth, down, 16, True, x.bfloat16()))
    act, scales, low = quantize_svdquant_w4a4(x, smooth, down)
    operands = (act, parts["qdata"], scales, parts["scale"], low, parts["proj_up"])
    opcheck(ops.scaled_mm_svdquant_w4a4.default, (*operands, None, False))
    opcheck(ops.scaled_mm_svdquant_w4a4.default, (*operands, torch.randn(128), True))


@pytest.mark.real_empty
def test_compile_without_graph_breaks():
    """One graph quantizes and multiplies, with the results of eager mode."""
    _, parts = layer()
    x, bias = torch.randn(5, 192), torch.randn(128)

    found = torch.compile(run_layer, backend="aot_eager", fullgraph=True)(x, parts, bias, unsigned=True, pad_size=4)

    assert torch.equal(found, run_layer(x, parts, bias, unsigned=True, pad_size=4))
