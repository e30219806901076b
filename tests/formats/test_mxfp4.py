"""mxfp4 against hand-made vectors, the number formats of ml_dtypes, compressed-tensors and gguf."""

import pytest
import torch
from torch.nn import functional as F

from lowbit.formats import parse_spec
from lowbit.numerics.packing import pack_nibbles
from tests.support import gaussian, outlier_weight, sqnr
from tests.support.search import searched, swept, unit_errors

FMT = parse_spec("mxfp4")
BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def _decode(parts, shape):
    return FMT.dequantize(parts, shape, torch.float32)


def test_every_code_with_every_scale():
    """All 16 x 256 pairs decode to the product of their ml_dtypes values; scale 255 is NaN."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).expand(256, 32)
    values = torch.from_numpy(codes[0].numpy().view(ml_dtypes.float4_e2m1fn).astype("float64"))
    scales = torch.from_numpy(BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype("float64"))

    decoded = FMT.decode(codes, {"scale": BYTES.unsqueeze(1)})

    expected = (values * scales.unsqueeze(1)).float()
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert torch.equal(decoded.nan_to_num(nan=0.0, posinf=1e39), expected.nan_to_num(nan=0.0, posinf=1e39))
    assert torch.equal(decoded[:255].signbit(), expected[:255].signbit())
    assert torch.equal(FMT.unpack(FMT.pack(codes), 32), codes)


@pytest.mark.parametrize("weight", [gaussian, outlier_weight])
def test_codes_and_values_are_those_of_ml_dtypes(weight):
    """Rounded by ml_dtypes at our scales, the codes are ours, ties and signs of zeros included."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w = (weight(40, 96) * 8).round() / 8 + 0.0  # many ties; zeros positive, as those of a zero group are stored so
    parts = FMT.quantize(w)
    scales = parts["scale"].view(torch.float8_e8m0fnu).float().repeat_interleave(32, dim=1)

    codes = torch.from_numpy((w / scales).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view("uint8"))

    assert torch.equal(parts["qdata"], pack_nibbles(codes))


@pytest.fixture(scope="module")
def compressor():
    """compressed-tensors' mxfp4 compressor and the scheme it asks for."""
    mxfp4 = pytest.importorskip("compressed_tensors.compressors.mxfp4")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
    )
    return mxfp4.MXFP4PackedCompressor, quantization.QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("weight", [gaussian, outlier_weight])
def test_compressed_tensors_packs_our_bytes_and_reads_our_values(weight, compressor):
    """Their scales of a float32 weight, their packed codes at them, and the values they decode are ours bit for bit."""
    mx = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    cls, scheme = compressor
    w = weight(48, 128)
    parts = FMT.quantize(w)
    scale = parts["scale"].view(torch.float8_e8m0fnu).float()

    theirs = cls.compress({"weight": w, "weight_scale": scale}, scheme)
    back = cls.decompress({"weight_packed": parts["qdata"], "weight_scale": parts["scale"]}, scheme)["weight"]

    assert torch.equal(theirs["weight_packed"], parts["qdata"])
    assert torch.equal(theirs["weight_scale"], parts["scale"])
    assert torch.equal(mx.generate_mx_scales(w.view(48, 4, 32).abs().amax(-1)).to(torch.uint8), parts["scale"])
    assert torch.equal(back, FMT.dequantize(parts, (48, 128), back.dtype))


def test_gguf_reads_our_values():
    """Reordered into blocks (a byte of scale, then codes j and j + 16 in a byte), gguf decodes our values."""
    quants, gguf = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf")
    w = outlier_weight(16, 128)
    w[2] = 0
    parts = FMT.quantize(w)
    codes = FMT.unpack(parts["qdata"], 128).view(16, 4, 2, 16)
    blocks = torch.cat([parts["scale"].unsqueeze(-1), codes[:, :, 0] | (codes[:, :, 1] << 4)], dim=-1).flatten(1)

    back = torch.from_numpy(quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4))

    assert torch.equal(_decode(parts, (16, 128)), back)


def test_the_rule_of_the_specification_loses_more():
    """The scale of the specification, 2**(floor(log2 amax) - 2), is a candidate's equal and 0.2 dB worse on its own."""
    w = gaussian(512, 512)
    ours = FMT.fit(w, {})
    amax = w.view(512, -1, 32).abs().amax(-1)
    theirs = {"scale": (torch.frexp(amax).exponent - 1 - 2 + 127).to(torch.uint8)}

    lost = sqnr(w, FMT.project(w, ours)) - sqnr(w, FMT.project(w, theirs))

    assert 0.18 <= lost <= 0.29
    assert bool((ours["scale"] - theirs["scale"] <= 1).all())
    best, _ = searched(FMT, w)
    assert bool((best <= unit_errors(FMT, w, theirs) * (1 + 1e-6)).all())


@pytest.mark.parametrize("k", [1, 7, 31, 33, 40])
def test_any_k(k):
    """A K that is no multiple of 32 is stored as if zeros followed, and gives the same values."""
    w = gaussian(5, k)
    padded = F.pad(w, (0, -k % 32))
    parts, whole = FMT.quantize(w), FMT.quantize(padded)

    FMT.check(parts, (5, k))
    assert torch.equal(parts["qdata"], whole["qdata"])
    assert torch.equal(parts["scale"], whole["scale"])
    assert torch.equal(_decode(parts, (5, k)), _decode(whole, tuple(padded.shape))[:, :k])


def test_zeros():
    """Zero groups have scale 0 and codes 0, negative zeros included; in others zeros keep their sign."""
    w = gaussian(2, 64)
    w[0, :32], w[1, 5] = -0.0, -0.0
    parts = FMT.quantize(w)

    assert parts["scale"][0, 0] == 0
    assert not parts["qdata"][0, :16].any()
    assert FMT.unpack(parts["qdata"], 64)[1, 5] == 8


def test_project_is_encode_and_decode():
    """The short way of the solvers equals the long way, ragged K and zeros included."""
    for w in (gaussian(64, 128), outlier_weight(9, 40), torch.zeros(3, 20)):
        params = FMT.fit(w, {})

        assert torch.equal(FMT.project(w, params), FMT.decode(FMT.encode(w, params), params)[:, : w.shape[1]])


def _halving_pays():
    """Groups whose largest weight lies at 3.5 to 7 times the scale, over others that a finer grid holds exactly."""
    w = 0.25 * torch.randint(-3, 4, (64, 64)).float()
    w[:, ::32] = torch.linspace(3.51, 7.0, 64).unsqueeze(1)
    return w


@pytest.mark.parametrize("make", [lambda: gaussian(64, 256), lambda: outlier_weight(64, 256), _halving_pays])
def test_the_candidates_equal_a_sweep_over_all_scales(make):
    """One candidate reaches the error of all 255 powers of two in every group, bounds used."""
    w = make()

    best, evaluated = searched(FMT, w)

    torch.testing.assert_close(best, swept(FMT, w, BYTES[:255]), rtol=1e-5, atol=0)
    assert evaluated <= 1


def test_the_search_can_gain():
    """Halving the scale is better for some groups and only for some."""
    w = _halving_pays()
    fitted = unit_errors(FMT, w, FMT.fit(w, {}))

    best, _ = searched(FMT, w)

    assert 0 < (best < fitted).sum() < fitted.numel()


@pytest.mark.parametrize("code", [0, 100, 125, 140, 254])
def test_the_search_may_start_anywhere(code):
    """From any scale, a solver's or a file's, the candidates lead to the best one."""
    w = outlier_weight(16, 64)
    start = {"scale": torch.full((16, 2), code, dtype=torch.uint8)}
    errors = [unit_errors(FMT, w, candidate.params) for candidate in FMT.candidates(w, start)]

    torch.testing.assert_close(torch.stack(errors).amin(0), swept(FMT, w, BYTES[:255]), rtol=1e-5, atol=0)


def test_what_clips_is_never_worse_than_its_double():
    """For a largest weight of 6 to 7 times the scale no weight of its group loses more than with twice that scale."""
    w = gaussian(256, 32)
    w *= torch.linspace(6.0, 7.0, 256).unsqueeze(1) / w.abs().amax(1, keepdim=True)
    params = FMT.fit(w, {})
    doubled = {"scale": params["scale"] + 1}
    fitted, coarser = ((FMT.project(w, p) - w).abs() for p in (params, doubled))

    assert bool((params["scale"][1:-1] == 127).all())
    assert bool((fitted <= coarser + 1e-5).all())
