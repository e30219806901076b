"""What every registered format promises, checked for all of them from the registry."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit.errors import FormatError, PartsError, UnknownFormatError, WeightError
from lowbit.formats import Format, formats, from_config, get_format, parse_spec, register
from lowbit.formats.base import DECODE_ELEMENTS
from lowbit.formats.parts import gather_rows, narrow_rows, raw_bytes
from tests.support import assert_sqnr_within, gaussian, outlier_weight, sqnr
from tests.support.specs import ALL_SPECS, READ_ONLY_SPECS, any_parts, weight_shape

GOLDEN = [(spec, value) for cls in formats().values() for spec, value in cls.golden_sqnr.items()]


@pytest.fixture(params=ALL_SPECS)
def fmt(request) -> Format:
    """Each registered format in each of its golden variants."""
    return parse_spec(request.param)


def _weight(fmt, dtype=torch.float32):
    return gaussian(*weight_shape(fmt), seed=5).to(dtype)


@pytest.mark.parametrize(("spec", "decibels"), GOLDEN)
def test_golden_sqnr(spec, decibels):
    """Rounding to nearest loses exactly what the format's golden number says, to both sides."""
    fmt, w = parse_spec(spec), gaussian(1024, 1024, seed=0)

    assert_sqnr_within(w, fmt.dequantize(fmt.quantize(w), (1024, 1024), torch.float32), decibels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_follow_their_rules(fmt, dtype):
    """quantize makes the parts, dtypes and byte count that the rules foretell, for each source dtype."""
    w = _weight(fmt, dtype)

    parts = fmt.quantize(w)

    fmt.check(parts, tuple(w.shape))
    assert list(parts) == list(fmt.part_names) or set(parts) == set(fmt.part_names)
    assert {name: part.dtype for name, part in parts.items()} == fmt.part_dtypes(dtype)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == fmt.nbytes(*w.shape, dtype)


def test_preparing_rows_is_undone_and_keeps_squares(fmt):
    """restore is the inverse of prepare, each row keeps its sum of squares, and the given rows are not written to."""
    w = _weight(fmt)
    before = w.clone()

    prepared = fmt.prepare(w)
    squares = prepared.square().sum(1)

    assert torch.equal(w, before)
    torch.testing.assert_close(squares, w.square().sum(1))
    torch.testing.assert_close(fmt.restore(prepared), w)


def test_a_share_of_the_bias_is_foretold(fmt):
    """folds_bias says, before there are parts, whether they give a share of the bias."""
    assert fmt.folds_bias is (fmt.bias_share(fmt.quantize(_weight(fmt))) is not None)


def test_spec_and_json_round_trip(fmt):
    """The spec string and the JSON config each name exactly this format."""
    assert parse_spec(fmt.spec) == fmt
    assert parse_spec(str(fmt)) == fmt
    assert from_config(json.loads(json.dumps(fmt.config()))) == fmt


def test_zeros_decode_to_zeros(fmt):
    """An all-zero weight decodes to zeros, with finite parts: no zero or NaN scale divides anything."""
    w = torch.zeros(weight_shape(fmt))

    parts = fmt.quantize(w)

    assert torch.equal(fmt.dequantize(parts, tuple(w.shape), torch.float32), w)
    assert all(torch.isfinite(part.float()).all() for part in parts.values())


def test_a_zero_row_among_others_decodes_to_zeros(fmt):
    """A row of zeros stays zero whatever its neighbours are."""
    w = _weight(fmt)
    w[3] = 0

    row = fmt.dequantize(fmt.quantize(w), tuple(w.shape), torch.float32)[3]

    assert row.abs().max() <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_an_error_that_names_the_layer(fmt, bad):
    """One NaN or infinity anywhere raises WeightError with the layer's name."""
    w = _weight(fmt)
    w[-1, -1] = bad

    with pytest.raises(WeightError, match=r"blocks\.7\.fc1: holds NaN or infinity"):
        fmt.quantize(w, where="blocks.7.fc1")


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1e4, 1e12])
def test_tiny_and_huge_weights_stay_finite(fmt, scale):
    """Weights of any float32 magnitude decode to finite values; ordinary ones keep their precision."""
    w = _weight(fmt) * scale

    back = fmt.dequantize(fmt.quantize(w), tuple(w.shape), torch.float32)

    assert torch.isfinite(back).all()
    # An 8-bit step of so small a weight is a subnormal float16, and ggml stores no other. Scales of NVFP4 are e4m3.
    coarse = (fmt.spec == "gguf(type=Q8_0)" and scale == 1e-4) or fmt.spec == "gguf(type=NVFP4)"
    if scale in (1e-4, 1e4) and not coarse:
        unscaled = _weight(fmt)
        usual = sqnr(unscaled, fmt.dequantize(fmt.quantize(unscaled), tuple(w.shape), torch.float32))
        assert abs(sqnr(w, back) - usual) < 1.0


def test_quantizing_what_was_decoded_changes_nothing_to_speak_of(fmt):
    """Requantizing the decoded weight is a fixed point but for the rounding of the scales.

    svdquant_w4a4 finds its smoothing and low-rank branch anew, so there it only must not get worse; w4a8_codebook
    decodes to integers of a row's scale, which the largest of them sets anew, and what is left is their rounding.
    """
    w = _weight(fmt)
    once = fmt.dequantize(fmt.quantize(w), tuple(w.shape), torch.float32)

    twice = fmt.dequantize(fmt.quantize(once), tuple(w.shape), torch.float32)

    gain = {"svdquant_w4a4": -1.0, "awq_w4a16": 1.0, "w4a8_codebook": 5.0}.get(fmt.name, 10.0)
    assert sqnr(once, twice) > sqnr(w, once) + gain


def test_rows_are_independent_pieces(fmt):
    """Decoding a range of rows, or rows gathered one by one, equals those rows of the whole."""
    w = _weight(fmt)
    n, k = w.shape
    parts = fmt.quantize(w)
    whole = fmt.dequantize(parts, (n, k), torch.float32)
    start = fmt.row_multiple if fmt.row_multiple < n else 0

    piece = fmt.dequantize_rows(parts, k, start, n, torch.float32)
    cut = narrow_rows(fmt.rules, parts, start, n)
    picked = gather_rows(fmt.rules, parts, torch.tensor([n - 1, 0, 5]))

    def same(rows, expected):  # a rotation or a low-rank branch is a matrix product, whose last bit depends on its size
        exact = not fmt.config().get("rotation") and fmt.name != "svdquant_w4a4"
        return torch.equal(rows, expected) if exact else sqnr(expected, rows) > 120

    assert same(piece, whole[start:])
    assert same(fmt.dequantize(cut, (n - start, k), torch.float32), whole[start:])
    assert same(fmt.single_rows.dequantize(picked, (3, k), torch.float32), whole[[n - 1, 0, 5]])


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(fmt, rows):
    """A weight of 0 or 1 rows is stored and decoded like any other."""
    if "rank" in dict(fmt.config()):
        fmt = dataclasses.replace(fmt, rank=1)
        if rows == 0:
            with pytest.raises(WeightError, match="keep"):
                fmt.quantize(torch.zeros(0, 64))
            return
    w = _weight(fmt)[:rows]

    parts = fmt.quantize(w)
    fmt.check(parts, tuple(w.shape))

    assert fmt.dequantize(parts, tuple(w.shape), torch.float32).shape == w.shape


@pytest.mark.parametrize("shape", [(64,), (2, 64, 64), (4, 4, 3, 3)])
def test_only_matrices_are_stored(fmt, shape):
    """1-D, 3-D and convolution weights raise WeightError that says to keep them."""
    with pytest.raises(
        WeightError, match=rf"conv: {fmt.name} stores a 2-D floating-point weight, not a {len(shape)}-D"
    ):
        fmt.quantize(torch.randn(shape), where="conv")


def test_integers_are_not_weights(fmt):
    """An already quantized (integer) tensor is refused, not cast."""
    with pytest.raises(WeightError, match="2-D int8 tensor; keep it"):
        fmt.quantize(torch.zeros(weight_shape(fmt), dtype=torch.int8))


def test_check_names_what_is_wrong(fmt):
    """Missing, unknown, mistyped and misshapen parts each give one PartsError naming layer and part."""
    w = _weight(fmt)
    parts = fmt.quantize(w)
    last = fmt.part_names[-1]

    with pytest.raises(PartsError, match=f"layer1: lacks {last}; expected the tensors"):
        fmt.check({name: part for name, part in parts.items() if name != last}, tuple(w.shape), "layer1")
    with pytest.raises(PartsError, match="layer1: has unknown tensors bogus"):
        fmt.check({**parts, "bogus": parts["qdata"]}, tuple(w.shape), "layer1")
    with pytest.raises(PartsError, match="layer1: qdata is int64, expected"):
        fmt.check({**parts, "qdata": torch.zeros(w.shape, dtype=torch.int64)}, tuple(w.shape), "layer1")
    with pytest.raises(PartsError, match=r"layer1: qdata has shape .* expected .* for N = 48, K = "):
        fmt.check({**parts, "qdata": parts["qdata"][:-1]}, tuple(w.shape), "layer1")


def test_quantize_is_deterministic_and_leaves_its_input_alone(fmt):
    """Two runs give the same bytes, and the weight is not written to."""
    w = _weight(fmt)
    before = w.clone()

    first, second = fmt.quantize(w), fmt.quantize(w)

    assert torch.equal(w, before)
    for name, part in first.items():
        assert torch.equal(raw_bytes(part), raw_bytes(second[name]))


def test_non_contiguous_weights(fmt):
    """A transposed view is quantized as its contiguous copy."""
    w = _weight(fmt)
    view = w.t().contiguous().t()

    for name, part in fmt.quantize(view).items():
        assert torch.equal(raw_bytes(part), raw_bytes(fmt.quantize(w)[name]))


def test_stochastic_rounding_is_seeded_and_unbiased(fmt):
    """With a seed, rounding is repeatable and right on average; formats without it say so."""
    w = _weight(fmt)
    if not fmt.stochastic:
        with pytest.raises(FormatError, match="has no stochastic rounding"):
            fmt.quantize(w, seed=1)
        return
    shape = tuple(w.shape)
    same = [fmt.dequantize(fmt.quantize(w, seed=7), shape, torch.float32) for _ in range(2)]
    mean = torch.stack([fmt.dequantize(fmt.quantize(w, seed=s), shape, torch.float32) for s in range(64)]).mean(0)
    nearest = fmt.dequantize(fmt.quantize(w), shape, torch.float32)

    assert torch.equal(*same)
    assert not torch.equal(same[0], nearest)
    assert sqnr(w, mean) > sqnr(w, nearest) + 8.0


def test_linear_equals_dequantize_and_matmul_in_chunks(fmt):
    """A weight larger than one chunk gives the same product as decoding it whole."""
    n, k = 2100, 2048
    assert n * k > DECODE_ELEMENTS
    w = outlier_weight(n, k, seed=2) * 0.02
    if "rank" in dict(fmt.config()):
        fmt = dataclasses.replace(fmt, rank=1)
    parts, x = fmt.quantize(w), torch.randn(3, k)
    whole = fmt.linear(x, parts, None)

    pieces = torch.cat(
        [fmt.linear(x, narrow_rows(fmt.rules, parts, a, min(a + 512, n)), None) for a in range(0, n, 512)], dim=-1
    )

    assert sqnr(whole, pieces) > 100


def test_weight_only_linear_is_bit_equal_to_dequantize_and_matmul(fmt):
    """Where activations are left alone, F.linear on the parts is dequantize() + F.linear bit for bit, in each dtype."""
    if fmt.rounds_input:
        pytest.skip("quantizes its activations")
    w = _weight(fmt)
    parts = fmt.quantize(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, bias = torch.randn(5, w.shape[1]).to(dtype), torch.randn(w.shape[0]).to(dtype)

        expected = F.linear(x, fmt.dequantize(parts, tuple(w.shape), dtype), bias)

        assert torch.equal(fmt.linear(x, parts, bias), expected)


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (1, 32), (17, 40), (1, 1), (32, 100)])
def test_weight_only_linear_of_any_shape(spec, n, k):
    """It takes x of 1 to 4 dimensions, M = 0, any N and K, and equals dequantize and matmul."""
    fmt, bias = parse_spec(spec), torch.randn(n)
    parts = fmt.quantize(gaussian(n, k))
    stored, dense = [parts[name] for name in fmt.part_names], fmt.dequantize(parts, (n, k), torch.float32)
    for shape in [(k,), (3, k), (0, k), (2, 3, k), (2, 1, 3, k)]:
        x = torch.randn(shape)
        assert torch.equal(lowbit.ops.linear(x, stored, bias, spec), F.linear(x, dense, bias))
        assert torch.equal(lowbit.ops.linear(x, stored, None, spec), F.linear(x, dense))


@pytest.mark.parametrize("spec", READ_ONLY_SPECS)
def test_a_format_for_reading_only_keeps_the_promises_of_reading(spec):
    """Spec, JSON, checks, rows one by one, embedding and linear are as with any format; quantize says what to take."""
    fmt = parse_spec(spec)
    n, k = weight_shape(fmt)
    parts = any_parts(fmt, (n, k))
    whole, x, rows = fmt.dequantize(parts, (n, k), torch.float32), torch.randn(3, k), torch.tensor([n - 1, 0, 5])

    fmt.check(parts, (n, k))
    with pytest.raises(PartsError, match="qdata has shape"):
        fmt.check({**parts, "qdata": parts["qdata"][:, :-1]}, (n, k))
    with pytest.raises(FormatError, match=r"layer1: .* can only be read, not made; convert to \w+"):
        fmt.quantize(gaussian(n, k), where="layer1")
    assert not fmt.encodable
    assert parse_spec(fmt.spec) == fmt == from_config(json.loads(json.dumps(fmt.config())))
    assert whole.isfinite().all()
    assert torch.equal(fmt.pack(fmt.unpack(parts["qdata"], k)), parts["qdata"])
    assert torch.equal(fmt.dequantize_rows(parts, k, 7, n, torch.float32), whole[7:])
    assert torch.equal(fmt.embedding(rows, parts, k, torch.float32), whole[rows])
    assert torch.equal(fmt.linear(x, parts, None), F.linear(x, whole))
    assert torch.equal(fmt.project(whole, parts), whole)


@pytest.mark.parametrize("spec", ["fp4_e9", "", "fp8_e4m3(", "fp8_e4m3(granularity)", "fp8_e4m3(color=red)"])
def test_bad_specs_are_refused(spec):
    """A wrong spec is a FormatError that shows what was given or known."""
    with pytest.raises(FormatError):
        parse_spec(spec)


def test_a_layout_is_not_part_of_a_format():
    """A spec with an arrangement behind @ is refused where only values count, with where it belongs."""
    with pytest.raises(FormatError, match="is the arrangement in a file or for a kernel"):
        parse_spec("svdquant_w4a4@kitchen_tile_packed_w4a4")


def test_an_unknown_format_is_both_a_key_error_and_a_value_error():
    """Integrations assert either; the message names the place and the sorted known formats."""
    for kind in (KeyError, ValueError):
        with pytest.raises(kind, match=r"unknown format 'int3' in layer a\.b; known formats: awq_w4a16, convrot_w4a4"):
            get_format("int3", "layer a.b")
    assert str(UnknownFormatError("x", ["b", "a"])) == "unknown format 'x'; known formats: a, b"


def test_a_second_format_of_a_name_is_refused():
    """Registration cannot silently replace a format."""
    with pytest.raises(FormatError, match="registered already"):
        register(type("Again", (Format,), {"name": "fp8_e4m3"}))


def test_a_pre_quant_scale_is_part_of_the_effective_weight():
    """linear multiplies x by the stored scale, and dequantize gives the weight that does the same."""
    fmt = parse_spec("fp8_e4m3(granularity=row,pre_quant_scale=true,input_scale=true)")
    w, scale = torch.randn(8, 32), torch.rand(32) + 0.5
    parts = {**fmt.plain.quantize(w / scale), "pre_quant_scale": scale, "input_scale": torch.tensor(0.1)}
    fmt.check(parts, (8, 32))
    x = torch.randn(3, 32)

    y = lowbit.ops.linear(x, [parts[name] for name in fmt.part_names], None, fmt.spec)

    assert sqnr(x @ fmt.dequantize(parts, (8, 32), torch.float32).t(), y) > 100
    assert sqnr(w, fmt.dequantize(parts, (8, 32), torch.float32)) > 25
