"""fp8_e4m3 and fp8_e5m2 in all granularities: exact codes, extremes, merging of small updates."""

from __future__ import annotations

import pytest
import torch

from lowbit import dispatch
from lowbit.errors import FormatError, WeightError
from lowbit.formats import parse_spec
from lowbit.formats.base import MIN_SCALE
from lowbit.layouts.base import fitting_layout
from lowbit.numerics.floats import fp8_max
from lowbit.tensor import QuantizedTensor
from tests.support import gaussian, outlier_weight, sqnr

NAMES = ["fp8_e4m3", "fp8_e5m2"]
FIELDS = ["", "(granularity=row)", "(granularity=block)", "(granularity=block,block_size=7x50)"]
SPECS = [name + fields for name in NAMES for fields in FIELDS]


def decoded(fmt, w, **options) -> torch.Tensor:
    """The weight after quantizing, float32."""
    return fmt.dequantize(fmt.quantize(w, **options), tuple(w.shape), torch.float32)


def tiles_of(fmt, w):
    """The tiles that share a scale, as (scale, tile), cut with plain slices."""
    scale = fmt.quantize(w)["scale"]
    rows, columns = fmt.unit(tuple(w.shape))
    for i, band in enumerate(w.split(rows, dim=0)):
        for j, tile in enumerate(band.split(columns, dim=1)):
            yield scale.reshape(-(-w.shape[0] // rows), -1)[i, j], tile


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(130, 257), (128, 128), (1, 1), (3, 300), (300, 3)])
def test_scales_and_codes_are_those_of_each_tile(spec, shape):
    """Ragged edges included, each tile has scale amax / max and the codes of torch's cast of tile / scale."""
    fmt, w = parse_spec(spec), outlier_weight(*shape)
    parts = fmt.quantize(w)
    fmt.check(parts, shape)
    whole = parts["qdata"].float()
    rows, columns = fmt.unit(shape)
    for index, (scale, tile) in enumerate(tiles_of(fmt, w)):
        across = -(-shape[1] // columns)
        top, left = index // across * rows, index % across * columns
        expected = (tile / scale).clamp(-fp8_max(fmt.dtype), fp8_max(fmt.dtype)).to(fmt.dtype).float()
        assert scale == (tile.abs().max() / fp8_max(fmt.dtype)).clamp_min(MIN_SCALE)
        assert torch.equal(whole[top : top + tile.shape[0], left : left + tile.shape[1]], expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("fields", "shape"),
    [("", ()), ("(granularity=row)", (130, 1)), ("(granularity=block)", (2, 3)), (FIELDS[3], (19, 6))],
)
def test_a_ragged_block_weight_is_still_blockwise(name, fields, shape):
    """The scale has the shape of the granularity asked for: a weight that no block divides never becomes row-wise."""
    assert parse_spec(name + fields).quantize(torch.randn(130, 257))["scale"].shape == shape


@pytest.mark.parametrize("spec", SPECS)
def test_the_largest_value_of_a_tile_is_kept(spec):
    """amax decodes to itself within float32 rounding: nothing saturates."""
    fmt, w = parse_spec(spec), gaussian(130, 257)
    for (_, tile), (_, back) in zip(tiles_of(fmt, w), tiles_of(fmt, decoded(fmt, w)), strict=True):
        assert torch.allclose(tile.abs().max(), back.abs().max(), rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_zero_tensors_rows_and_blocks_decode_to_zeros(spec):
    """A zero scale would decode to NaN (as it does elsewhere); the lowest scale is 1e-8 and zeros stay zeros."""
    fmt, w = parse_spec(spec), gaussian(130, 257)
    w[:14], w[:, 100:150] = 0, 0
    parts = fmt.quantize(w)
    assert bool((decoded(fmt, w)[w == 0] == 0).all())
    assert bool((parts["scale"] >= MIN_SCALE).all())
    assert torch.equal(decoded(fmt, torch.zeros(130, 257)), torch.zeros(130, 257))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-10, 1e-5, 1e30, 1e38])
def test_tiny_and_huge_weights_stay_finite_and_no_larger_than_they_were(spec, size):
    """From float32 subnormals to the end of its range nothing becomes NaN, infinite or larger than a rounding step."""
    fmt, w = parse_spec(spec), torch.rand(130, 257).mul_(2).sub_(1) * size
    back = decoded(fmt, w)
    assert bool(back.isfinite().all())
    assert back.abs().max() <= w.abs().max() * 1.13
    if size >= 1e-5:
        assert sqnr(w / size, back / size) > (31 if fmt.dtype == torch.float8_e4m3fn else 25)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_divided_in_float32(spec, dtype):
    """A 16-bit weight has the parts of the same numbers as float32: no scale or division is rounded to 16 bits."""
    fmt, w = parse_spec(spec), gaussian(100, 200, dtype=dtype)
    small, wide = fmt.quantize(w), fmt.quantize(w.float())
    assert torch.equal(small["qdata"].view(torch.uint8), wide["qdata"].view(torch.uint8))
    assert torch.equal(small["scale"], wide["scale"])


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_is_one_multiplication_rounded_once(spec):
    """The 16-bit result is the float32 product code * scale, cast."""
    fmt, w = parse_spec(spec), gaussian(100, 200)
    parts = fmt.quantize(w)
    wide = fmt.dequantize(parts, (100, 200), torch.float32)
    scale = fmt._spread(parts["scale"], w.shape)
    assert torch.equal(wide, parts["qdata"].float() * scale)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(fmt.dequantize(parts, (100, 200), dtype), wide.to(dtype))


def test_a_tensor_scale_decodes_to_the_bits_of_comfy_kitchen():
    """In float32, where it rounds nothing on the way, the convention's owner decodes our parts to the same bits."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    for name in NAMES:
        fmt, w = parse_spec(name), gaussian(64, 96)
        parts = fmt.quantize(w)
        theirs = kitchen.dequantize_per_tensor_fp8(parts["qdata"], parts["scale"], torch.float32)
        assert torch.equal(fmt.dequantize(parts, (64, 96), torch.float32), theirs)


def test_bfloat16_weights_lose_no_more_than_in_comfy_kitchen():
    """The owner rounds 1 / scale to bfloat16 first; our squared error is smaller on the same weight."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    w = gaussian(512, 512, dtype=torch.bfloat16)
    fmt = parse_spec("fp8_e4m3")
    scale = fmt.quantize(w)["scale"]
    theirs = kitchen.quantize_per_tensor_fp8(w, scale).float() * scale
    assert sqnr(w, decoded(fmt, w)) > sqnr(w, theirs)


@pytest.mark.parametrize("spec", SPECS)
def test_stochastic_rounding_is_seeded_and_moves_to_a_neighbour(spec):
    """The same seed gives the same bytes, another seed others, and no value moves by a whole step."""
    fmt, w = parse_spec(spec), gaussian(100, 200)
    one, again, other = (fmt.quantize(w, seed=seed)["qdata"].view(torch.uint8) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    magnitude = 0.1251 if fmt.dtype == torch.float8_e4m3fn else 0.2501
    step = torch.maximum(w.abs() * magnitude, fmt._spread(fmt.quantize(w)["scale"], w.shape) * 2.0**-9)
    assert bool(((decoded(fmt, w, seed=5) - w).abs() <= step).all())


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_recovers_a_small_update(name):
    """A LoRA's update far below a step is lost by rounding to nearest and there on average with random rounding."""
    w = gaussian(64, 256) * 0.02
    fmt = parse_spec(f"{name}(granularity=row)")
    base = decoded(fmt, w)
    delta = torch.randn(64, 4) @ torch.randn(4, 256) * 1e-5
    delta[base.abs() >= base.abs().amax(1, keepdim=True)] = 0  # a moved peak would move the scale and all codes
    nearest = decoded(fmt, base + delta) - base
    mean = sum(decoded(fmt, base + delta, seed=seed) - base for seed in range(1, 257)) / 256
    signal = (delta * delta).sum()
    assert (nearest * delta).sum() / signal < 0.5
    assert abs((mean * delta).sum() / signal - 1) < 0.1


@pytest.mark.parametrize("spec", SPECS)
def test_embedding_rows_are_the_decoded_rows(spec):
    """Rows gathered by index equal those of the whole decoded weight, across block borders."""
    fmt, w = parse_spec(spec), gaussian(130, 257)
    indices = torch.tensor([[129, 0], [128, 127]])
    rows = fmt.embedding(indices, fmt.quantize(w), 257, torch.float32)
    assert torch.equal(rows, decoded(fmt, w)[indices])


@pytest.mark.parametrize("spec", SPECS)
def test_a_nan_anywhere_is_an_error(spec):
    """The error names the layer; no NaN scale is stored."""
    w = gaussian(130, 257)
    w[129, 256] = torch.nan
    with pytest.raises(WeightError, match=r"blocks\.3\.ff: holds NaN or infinity"):
        parse_spec(spec).quantize(w, where="blocks.3.ff")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("granularity=column", "granularity is 'column', expected one of tensor, row, block"),
        ("block_size=128", "block_size is 128, expected rows x columns"),
        ("block_size=128x0", "expected rows x columns"),
        ("block_size=1x2x3", "expected rows x columns"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    """Every field's bad value gives one FormatError that says what is allowed."""
    with pytest.raises(FormatError, match=message):
        parse_spec(f"fp8_e4m3({fields})")


@pytest.mark.parametrize("fields", ["", "granularity=row,", "granularity=block,", "granularity=block,block_size=7x50,"])
def test_rounded_activations_keep_the_weight_and_change_the_linear_alone(fields):
    """With activations=fp8 the parts are the same, and the product is within e4m3's error of that of the weight."""
    fmt, plain = parse_spec(f"fp8_e4m3({fields}activations=fp8)"), parse_spec(f"fp8_e4m3({fields}activations=none)")
    w, x, bias = gaussian(130, 257) * 0.02, torch.randn(2, 9, 257), torch.randn(130)
    parts = fmt.quantize(w)
    same = plain.quantize(w)
    assert torch.equal(parts["qdata"].view(torch.uint8), same["qdata"].view(torch.uint8))
    assert torch.equal(parts["scale"], same["scale"])
    assert (fmt.rounds_input, plain.rounds_input) == (True, False)
    y, exact = fmt.linear(x, parts, bias), plain.linear(x, parts, bias)
    assert y.shape == (2, 9, 130)
    assert 29 < sqnr(exact - bias, y - bias) < 35


def test_activations_are_none_unless_asked_for():
    """The default leaves the input alone and is not part of a spec; fp8_e5m2 has no such field."""
    assert str(parse_spec("fp8_e4m3(activations=none)")) == "fp8_e4m3"
    with pytest.raises(FormatError, match="activations is 'int8', expected one of none, fp8"):
        parse_spec("fp8_e4m3(activations=int8)")
    with pytest.raises(FormatError, match="fp8_e5m2 has no field activations"):
        parse_spec("fp8_e5m2(activations=fp8)")


def test_native_kernels_leave_rounded_activations_to_eager():
    """On a CPU, packed for it or not, a linear with activations=fp8 is the reference's, and kernels say why."""
    spec = "fp8_e4m3(granularity=row,activations=fp8)"
    fmt, w, x = parse_spec(spec), gaussian(64, 128), torch.randn(3, 128)
    parts = fmt.quantize(w)
    layer = QuantizedTensor.quantize(w, spec, dtype=torch.float32)
    assert torch.equal(torch.nn.functional.linear(x, layer), fmt.linear(x, parts, None))
    assert fitting_layout("rows16", fmt, 64, 128) is None
    assert fitting_layout("rows16", parse_spec("fp8_e4m3(granularity=row)"), 64, 128) is not None
    reasons = dispatch.explain("linear", "fp8_e4m3", "", "cpu", (fmt, x, parts, None))
    assert "rounds its input" in reasons.get("cpu:linear_plain", "rounds its input")  # where the backend is built
