"""mxfp8 against hand-made vectors, the number formats of ml_dtypes, and comfy-kitchen."""

import pytest
import torch
from torch.nn import functional as F

from lowbit.formats import parse_spec
from lowbit.layouts.scale_128x4 import swizzle
from tests.support import gaussian, outlier_weight, sqnr
from tests.support.search import searched, swept

FMT = parse_spec("mxfp8")
BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def _decode(parts, shape):
    return FMT.dequantize(parts, shape, torch.float32)


def test_every_code_with_every_scale():
    """All 256 x 256 pairs decode to the product of their ml_dtypes values; scale 255 and the NaN codes are NaN."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = BYTES.view(torch.float8_e4m3fn).expand(256, 256)
    values = torch.from_numpy(BYTES.numpy().view(ml_dtypes.float8_e4m3fn).astype("float64"))
    scales = torch.from_numpy(BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype("float64"))

    decoded = FMT.decode(codes, {"scale": BYTES.unsqueeze(1).expand(256, 8)})

    expected = (values * scales.unsqueeze(1)).float()
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert torch.equal(decoded.nan_to_num(nan=0.0, posinf=1e39), expected.nan_to_num(nan=0.0, posinf=1e39))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [gaussian, outlier_weight])
def test_codes_and_values_are_those_of_comfy_kitchen(weight, dtype):
    """quantize and dequantize equal comfy-kitchen's eager functions bit for bit, but for the order of scales."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    w = weight(130, 224, dtype=dtype)
    w[3, 32:96] = -0.0
    parts = FMT.quantize(w)

    codes, scales = kitchen.quantize_mxfp8(w)
    back = kitchen.dequantize_mxfp8(codes, scales, torch.float32)

    assert torch.equal(parts["qdata"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(swizzle(parts["scale"]), scales.view(torch.uint8))
    assert torch.equal(_decode(parts, tuple(w.shape)), back)


def test_codes_round_half_to_even_and_nothing_clips():
    """At scale 1, ties go to even codes, and the largest weight of a group is never beyond 448."""
    values = torch.zeros(1, 32)
    values[0, :6] = torch.tensor([448.0, 17.0, 19.0, 432.0, 2.0**-10, 3 * 2.0**-10])

    back = _decode(FMT.quantize(values), (1, 32))[0, :6]

    assert back.tolist() == [448.0, 16.0, 20.0, 448.0, 0.0, 2.0**-8]


@pytest.mark.parametrize("k", [1, 31, 33, 40])
def test_any_k(k):
    """A K that is no multiple of 32 is stored as if zeros followed, and gives the same values."""
    w = gaussian(5, k)
    padded = F.pad(w, (0, -k % 32))
    parts, whole = FMT.quantize(w), FMT.quantize(padded)

    FMT.check(parts, (5, k))
    assert torch.equal(parts["qdata"].view(torch.uint8), whole["qdata"].view(torch.uint8))
    assert torch.equal(parts["scale"], whole["scale"])
    assert torch.equal(_decode(parts, (5, k)), _decode(whole, tuple(padded.shape))[:, :k])


def test_stochastic_rounding_of_a_ragged_k():
    """Seeded rounding fills the last group with zeros and moves no value by more than one step."""
    w = gaussian(16, 40)

    parts = FMT.quantize(w, seed=3)

    assert not parts["qdata"].view(torch.uint8)[:, 40:].any()
    assert sqnr(w, _decode(parts, (16, 40))) > 27


def test_project_is_encode_and_decode():
    """The short way of the solvers equals the long way, ragged K and zeros included."""
    for w in (gaussian(64, 128), outlier_weight(9, 40), torch.zeros(3, 20)):
        params = FMT.fit(w, {})

        assert torch.equal(FMT.project(w, params), FMT.decode(FMT.encode(w, params), params)[:, : w.shape[1]])


def _halving_pays():
    """Groups whose largest value rounds down to 224 and whose others lie in the coarse end of the grid."""
    w = 2.0**-8 * torch.randn(64, 64)
    w[:, ::32] = torch.linspace(220.0, 240.0, 64).unsqueeze(1)
    return w


@pytest.mark.parametrize("make", [lambda: gaussian(64, 256), lambda: outlier_weight(64, 256), _halving_pays])
def test_the_candidates_equal_a_sweep_over_all_scales(make):
    """One or two candidates reach the error of all 255 powers of two in every group."""
    w = make()

    best, evaluated = searched(FMT, w)

    torch.testing.assert_close(best, swept(FMT, w, BYTES[:255]), rtol=1e-5, atol=0)
    assert evaluated <= 1


def test_the_search_can_gain():
    """Halving the scale is better for groups whose peak would be rounded down anyway, and only for them."""
    w = _halving_pays()
    fitted = FMT.unit_errors((FMT.project(w, FMT.fit(w, {})) - w).double().square())

    best, _ = searched(FMT, w)

    assert 0 < (best < fitted).sum() < fitted.numel()


@pytest.mark.parametrize("code", [0, 100, 140, 254])
def test_the_search_may_start_anywhere(code):
    """From any scale, a solver's or a file's, the candidates lead to the best one."""
    w = outlier_weight(16, 64)
    start = {"scale": torch.full((16, 2), code, dtype=torch.uint8)}
    errors = [FMT.unit_errors((FMT.project(w, c.params) - w).double().square()) for c in FMT.candidates(w, start)]

    torch.testing.assert_close(torch.stack(errors).amin(0), swept(FMT, w, BYTES[:255]), rtol=1e-5, atol=0)
