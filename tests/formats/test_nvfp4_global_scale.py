"""nvfp4 with a divisor as global scale, or with one for each row: against compressed-tensors, and joined weights."""

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit.errors import FormatError
from lowbit.formats import parse_spec
from lowbit.formats.global_scale import MIN_GLOBAL_SCALE
from lowbit.formats.parts import raw_bytes
from lowbit.solvers import solver
from tests.support import gaussian, outlier_weight, sqnr
from tests.support.search import searched, swept

DIVIDES = parse_spec("nvfp4(global_scale_divides=true)")
BY_ROW = parse_spec("nvfp4(row_global_scale=true)")
BOTH = parse_spec("nvfp4(global_scale_divides=true,row_global_scale=true)")
VARIANTS = [DIVIDES, BY_ROW, BOTH]


def _decode(fmt, parts, shape, dtype=torch.float32):
    return fmt.dequantize(parts, shape, dtype)


def _same(left, right):
    return torch.equal(raw_bytes(left), raw_bytes(right))


@pytest.fixture(scope="module")
def owner():
    """compressed-tensors' nvfp4 compressor, its scheme, and its own choice of scales."""
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)

    def chosen(w):
        groups = w.unflatten(1, (-1, 16))
        divisor = helpers.generate_gparam(w.amin(), w.amax())
        return divisor, helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), args, divisor)[0]

    return nvfp4.NVFP4PackedCompressor, scheme, chosen


@pytest.mark.parametrize("weight", [gaussian, outlier_weight])
def test_the_bytes_are_those_that_compressed_tensors_makes(weight, owner):
    """Global scale, group scales and packed codes of a float32 weight equal its own choice bit for bit."""
    cls, scheme, chosen = owner
    w = weight(48, 128, seed=3)
    parts = DIVIDES.quantize(w)
    divisor, scale = chosen(w)
    alive = parts["scale"].view(torch.uint8) != 0  # where all codes are zero theirs is 0.125, which changes nothing

    theirs = cls.compress({"weight": w, "weight_scale": scale, "weight_global_scale": divisor}, scheme)

    assert alive.float().mean() > 0.9
    assert torch.equal(divisor, parts["global_scale"].reshape(1))
    assert torch.equal(theirs["weight_scale"].view(torch.uint8)[alive], parts["scale"].view(torch.uint8)[alive])
    same = theirs["weight_packed"] == parts["qdata"]
    assert bool(same.view(48, 8, 8)[alive].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [gaussian, outlier_weight])
def test_values_are_those_that_compressed_tensors_decodes(weight, dtype, owner):
    """For any divisor its decompressor and its dequantize give our values bit for bit, in float32 and rounded once."""
    cls, scheme, _ = owner
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    parts = DIVIDES.quantize(weight(48, 128, seed=4))
    parts["global_scale"] = parts["global_scale"] * 1.0371
    divisor = parts["global_scale"].reshape(1)

    codes = helpers.unpack_fp4_from_uint8(parts["qdata"], 48, 128, dtype=torch.float32)
    scale = parts["scale"].float()
    whole = forward.dequantize(codes, scale, args=scheme.weights, dtype=dtype, global_scale=divisor)
    stored = {"weight_packed": parts["qdata"], "weight_scale": parts["scale"], "weight_global_scale": divisor}
    theirs = cls.decompress(stored, scheme)["weight"]

    assert torch.equal(_decode(DIVIDES, parts, (48, 128), dtype), whole)
    assert torch.equal(_decode(DIVIDES, parts, (48, 128), theirs.dtype), theirs)


def test_a_divisor_is_not_a_factor():
    """Only divided by is the value exact: multiplying by the reciprocal changes bits, which is why it is a field."""
    w = outlier_weight(64, 256)
    parts = DIVIDES.quantize(w)
    factor = parse_spec("nvfp4")
    recast = DIVIDES.recast(parts, factor)
    exact = parts["scale"].float().double() / parts["global_scale"].double()

    divided, multiplied = _decode(DIVIDES, parts, (64, 256)), _decode(factor, recast, (64, 256))

    codes = _decode(factor, {**parts, "scale": torch.ones_like(parts["scale"].float()).to(torch.float8_e4m3fn),
                             "global_scale": torch.ones(())}, (64, 256))  # fmt: skip
    expected = (exact.float().repeat_interleave(16, dim=1) * codes).float()
    assert torch.equal(divided, expected)
    assert not torch.equal(divided, multiplied)
    torch.testing.assert_close(multiplied, divided, rtol=3e-7, atol=0)
    assert torch.equal(factor.recast(recast, DIVIDES)["qdata"], parts["qdata"])
    with pytest.raises(FormatError, match="codes mean nothing in int8"):
        DIVIDES.recast(parts, parse_spec("int8"))
    with pytest.raises(FormatError, match="codes mean nothing in nvfp4"):
        BY_ROW.recast(BY_ROW.quantize(w), factor)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-10, 1e10, 3e38])
@pytest.mark.parametrize("fmt", VARIANTS, ids=str)
def test_tiny_and_huge_weights(fmt, magnitude):
    """Any float32 magnitude stays finite, and keeps its precision where float32 can divide it."""
    w = gaussian(32, 64, seed=3)
    w *= magnitude / w.abs().max()
    parts = fmt.quantize(w)
    back = _decode(fmt, parts, (32, 64))

    assert torch.isfinite(back).all()
    edge = parts["global_scale"].reciprocal() if fmt.global_scale_divides else parts["global_scale"]
    assert bool((edge >= MIN_GLOBAL_SCALE).all())
    assert magnitude == 1e-38 or sqnr(w / magnitude, back / magnitude) > 20


@pytest.mark.parametrize("fmt", VARIANTS, ids=str)
def test_zeros(fmt):
    """A zero weight, and a zero row that has its own global scale, get 1; their scales and codes are 0."""
    w = gaussian(4, 64)
    w[1] = -0.0
    nothing, parts = fmt.quantize(torch.full((4, 64), -0.0)), fmt.quantize(w)

    assert bool((nothing["global_scale"] == 1).all())
    assert not nothing["qdata"].any()
    assert not fmt.row_global_scale or parts["global_scale"][1] == 1
    assert not parts["qdata"][1].any()
    assert not parts["scale"].view(torch.uint8)[1].any()


@pytest.mark.parametrize("fmt", VARIANTS, ids=str)
def test_project_is_encode_and_decode(fmt):
    """The short way of the solvers equals the long way, ragged K included."""
    for w in (gaussian(64, 128), outlier_weight(9, 40), torch.zeros(3, 20)):
        params = fmt.fit(w, fmt.fit_shared(w))

        assert torch.equal(fmt.project(w, params), fmt.decode(fmt.encode(w, params), params)[:, : w.shape[1]])


@pytest.mark.parametrize("fmt", VARIANTS, ids=str)
def test_the_candidates_equal_a_sweep_over_all_scales(fmt):
    """Few candidates reach the error of all 126 positive scales in every group."""
    w = outlier_weight(64, 128)
    best, evaluated = searched(fmt, w, rows=64)

    every = [torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn) for code in range(1, 127)]
    torch.testing.assert_close(best, swept(fmt, w, every), rtol=1e-5, atol=0)
    assert evaluated <= 22


@pytest.mark.parametrize("name", ["rtn", "scale_search", "learned_rounding"])
@pytest.mark.parametrize("fmt", VARIANTS, ids=str)
def test_solvers_work_on_the_variants(fmt, name):
    """A solver's weight is as good as with the plain format, or better where rows of unequal size have own scales."""
    w = outlier_weight(40, 96) * torch.linspace(0.01, 1, 40).unsqueeze(1)
    plain = parse_spec("nvfp4")
    parts, usual = solver(name)(w, fmt), solver(name)(w, plain)

    fmt.check(parts, (40, 96))
    assert sqnr(w, _decode(fmt, parts, (40, 96))) > sqnr(w, _decode(plain, usual, (40, 96))) - 0.2


def test_small_rows_keep_their_precision_with_a_scale_of_their_own():
    """A row 3 * 10**6 times smaller than another is lost under one global scale, and kept under one a row."""
    w = gaussian(2, 256)
    w[1] *= 3e-7
    plain = parse_spec("nvfp4")

    assert sqnr(w[1], _decode(plain, plain.quantize(w), (2, 256))[1]) < 1
    assert sqnr(w[1], _decode(BY_ROW, BY_ROW.quantize(w), (2, 256))[1]) > 19


@pytest.mark.parametrize("spec", ["nvfp4", DIVIDES.spec])
def test_joining_weights_of_unequal_global_scales_keeps_every_value(spec):
    """torch.cat along N gives a global scale a row and the very values, quantized; linear equals the three apart."""
    shards = [
        lowbit.QuantizedTensor.quantize(gaussian(n, 64, seed=n) * f, spec) for n, f in ((48, 1), (16, 2.14), (7, 0.3))
    ]
    before = lowbit.fallbacks()

    joined = torch.cat(shards)

    assert isinstance(joined, lowbit.QuantizedTensor)
    assert lowbit.fallbacks() == before
    assert joined.format == (BOTH if "divides" in spec else BY_ROW)
    assert joined.global_scale.shape == (71,)
    assert torch.equal(joined.dequantize(), torch.cat([shard.dequantize() for shard in shards]))
    x = torch.randn(3, 64)
    apart = torch.cat([F.linear(x, shard) for shard in shards], dim=-1)
    torch.testing.assert_close(F.linear(x, joined), apart, rtol=1e-5, atol=1e-5)
    again = torch.cat([joined[48:], joined[:48]])
    assert again.format == joined.format
    assert torch.equal(again.dequantize(), torch.cat([joined.dequantize()[48:], joined.dequantize()[:48]]))


def test_joining_weights_of_equal_global_scales_keeps_the_format():
    """Pieces of one weight, and weights that happen to agree, stay as they are."""
    w = lowbit.QuantizedTensor.quantize(gaussian(32, 64), "nvfp4")
    other = lowbit.QuantizedTensor.quantize(gaussian(32, 64), "nvfp4")

    for joined in (torch.cat([w[:16], w[16:]]), torch.cat([w, other])):
        assert joined.spec == "nvfp4"
        assert joined.global_scale.shape == ()


def test_a_row_is_cut_with_its_scale():
    """Slices, selected rows and an embedding of a weight with a scale a row have the values of those rows."""
    w = lowbit.QuantizedTensor.quantize(gaussian(33, 40) * torch.linspace(0.1, 3, 33).unsqueeze(1), BOTH)
    dense, rows = w.dequantize(), torch.tensor([32, 0, 7])

    assert torch.equal(w[5:9].dequantize(), dense[5:9])
    assert torch.equal(w[::2].dequantize(), dense[::2])
    assert torch.equal(F.embedding(rows, w), dense[rows])


@pytest.mark.parametrize("bad", ["1", "yes"])
def test_a_field_is_true_or_false(bad):
    """Any other value of the two fields is refused."""
    with pytest.raises(FormatError, match="global_scale_divides is"):
        parse_spec(f"nvfp4(global_scale_divides={bad})")
    with pytest.raises(FormatError, match="row_global_scale is"):
        parse_spec(f"nvfp4(row_global_scale={bad})")
