"""nvfp4 against hand-made vectors, the number formats of ml_dtypes, and its owners' code."""

import pytest
import torch
from torch.nn import functional as F

from lowbit.errors import FormatError
from lowbit.formats import parse_spec
from lowbit.formats.global_scale import MIN_GLOBAL_SCALE
from lowbit.layouts.scale_128x4 import swizzle
from lowbit.numerics.packing import swap_nibbles
from tests.support import assert_sqnr_within, gaussian, outlier_weight, sqnr
from tests.support.search import searched, swept

FMT = parse_spec("nvfp4")
E4M3_CODES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def _decode(parts, shape):
    return FMT.dequantize(parts, shape, torch.float32)


def _one_step(values):
    """The codes of values [K] whose groups and weight have a scale of 1."""
    rows = torch.tensor([values])
    params = {"scale": torch.ones(1, 1).to(torch.float8_e4m3fn), "global_scale": torch.ones(())}
    return FMT.encode(rows, params)[0, : rows.shape[1]].tolist()


def test_golden_bytes():
    """The row 0..31 has the bytes and scales that comfy-kitchen's documentation of the format fixes."""
    parts = FMT.quantize(torch.arange(32.0).expand(16, 32))

    high_first = swap_nibbles(parts["qdata"])[0].numpy().tobytes().hex(" ", 1)
    assert high_first == "01 22 34 45 55 66 67 77 55 56 66 66 66 77 77 77"
    assert parts["scale"][0].float().tolist() == [224.0, 448.0]
    assert parts["global_scale"] == torch.tensor(31.0) / 2688


def test_ties_round_to_even():
    """Values half-way between two codes get the one with an even mantissa; beyond 6 they saturate."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1e30]
    even = [0, 2, 2, 4, 4, 6, 6, 7, 7]

    assert _one_step(ties) == even
    assert _one_step([-tie for tie in ties]) == [code | 8 for code in even]


def test_neighbours_of_ties():
    """One ulp off a tie decides it."""
    for tie, lower in [(0.25, 0), (0.75, 1), (1.25, 2), (1.75, 3), (2.5, 4), (3.5, 5), (5.0, 6)]:
        below, above = (float(torch.nextafter(torch.tensor(tie), torch.tensor(end))) for end in (0.0, 9.0))
        assert _one_step([below, above]) == [lower, lower + 1]


def test_every_code_with_every_scale():
    """All 16 x 256 pairs decode to the product of their ml_dtypes values, NaN scales to NaN."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = torch.arange(16, dtype=torch.uint8).expand(256, 16)
    params = {"scale": E4M3_CODES.view(torch.float8_e4m3fn).unsqueeze(1), "global_scale": torch.tensor(0.37)}
    values = torch.from_numpy(codes[0].numpy().view(ml_dtypes.float4_e2m1fn).astype("float32"))
    scales = torch.from_numpy(E4M3_CODES.numpy().view(ml_dtypes.float8_e4m3fn).astype("float32"))

    expected = values * (scales * 0.37).unsqueeze(1)

    assert torch.equal(FMT.decode(codes, params).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(FMT.unpack(FMT.pack(codes), 16), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [gaussian, outlier_weight])
def test_codes_and_values_are_those_of_comfy_kitchen(weight, dtype):
    """quantize and dequantize equal comfy-kitchen's eager functions bit for bit, in another order of storage."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    w = weight(130, 208, dtype=dtype)
    w[3, 16:48] = 0
    parts = FMT.quantize(w)

    codes, scales = kitchen.quantize_nvfp4(w, parts["global_scale"])
    back = kitchen.dequantize_nvfp4(codes, parts["global_scale"], scales, torch.float32)

    assert torch.equal(swap_nibbles(parts["qdata"]), codes)
    assert torch.equal(swizzle(parts["scale"]).view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(_decode(parts, tuple(w.shape)), back)


def test_codes_and_values_are_those_of_compressed_tensors():
    """compressed-tensors packs the same bytes at our scales and decodes our values; its global scale divides."""
    pytest.importorskip("compressed_tensors", "0.20")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward_helpers")
    w = outlier_weight(48, 128)
    w *= 2688 * 2.0**-10 / w.abs().max()  # a power of two as global scale: its reciprocal is exact
    parts = FMT.quantize(w)
    scale, divisor = parts["scale"].float(), 1 / parts["global_scale"].reshape(1)

    packed = helpers.quantize_and_pack_fp4(w, scale, global_scale=divisor)
    codes = helpers.unpack_fp4_from_uint8(parts["qdata"], 48, 128, dtype=torch.float32)
    groups = forward._dequantize(codes.view(48, 8, 16), scale.unsqueeze(-1), global_scale=divisor)

    assert torch.equal(parts["qdata"], packed)
    assert torch.equal(_decode(parts, (48, 128)), groups.flatten(1))


@pytest.mark.parametrize("k", [1, 7, 16, 17, 40, 100])
def test_any_k(k):
    """A K that is no multiple of 16 is stored as if zeros followed, and gives the same values."""
    w = gaussian(5, k)
    padded = F.pad(w, (0, -k % 16))
    parts, whole = FMT.quantize(w), FMT.quantize(padded)

    FMT.check(parts, (5, k))
    assert torch.equal(parts["qdata"], whole["qdata"])
    assert torch.equal(parts["scale"].view(torch.uint8), whole["scale"].view(torch.uint8))
    assert torch.equal(_decode(parts, (5, k)), _decode(whole, tuple(padded.shape))[:, :k])
    assert sqnr(w, _decode(parts, (5, k))) > 18


def test_zeros():
    """A zero weight has global scale 1; zero groups have scale 0 and codes 0, negative zeros included."""
    w = gaussian(4, 64)
    w[1, 16:32], w[2] = -0.0, 0.0
    parts, nothing = FMT.quantize(w), FMT.quantize(torch.full((4, 64), -0.0))

    assert nothing["global_scale"] == 1
    assert not nothing["qdata"].any()
    assert not nothing["scale"].view(torch.uint8).any()
    assert not parts["qdata"][1, 8:16].any()
    assert not parts["qdata"][2].any()
    assert parts["scale"].view(torch.uint8).eq(0).sum() == 5


def test_a_group_too_small_for_its_scale_is_zero():
    """Where the scale underflows to 0, codes are 0 too: scale 0 exactly where all codes are 0."""
    w = torch.full((2, 16), 1.0)
    w[1] = -1e-9
    parts = FMT.quantize(w)

    assert parts["scale"].view(torch.uint8).flatten().tolist() == [0x7E, 0]
    assert not parts["qdata"][1].any()


def test_the_sign_of_zero_survives_in_a_living_group():
    """A negative value that rounds to zero gets code 8, as the format's owners store it."""
    assert _one_step([-0.0, 0.0, -0.1, 0.1]) == [8, 0, 8, 0]


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-10, 1e10, 3e38])
def test_tiny_and_huge_weights(magnitude):
    """Any float32 magnitude keeps the format's precision; what float32 itself cannot divide becomes exactly zero."""
    w = gaussian(32, 64, seed=3)
    w *= magnitude / w.abs().max()
    parts = FMT.quantize(w)

    assert torch.isfinite(_decode(parts, (32, 64))).all()
    assert parts["global_scale"] >= MIN_GLOBAL_SCALE
    if magnitude > 1e-38:
        assert_sqnr_within(w / magnitude, _decode(parts, (32, 64)) / magnitude, 20.5, 0.3)


def test_project_is_encode_and_decode():
    """The short way of the solvers equals the long way but for signs of zeros, ragged K and zero groups included."""
    for some in (gaussian(64, 128), outlier_weight(9, 40), torch.zeros(3, 20)):
        w = torch.cat([some, torch.zeros(1, some.shape[1])])
        params = FMT.fit(w, FMT.fit_shared(w))

        assert torch.equal(FMT.project(w, params), FMT.decode(FMT.encode(w, params), params)[:, : w.shape[1]])


def _uneven_groups():
    """Groups spread over all of the e4m3 range, subnormal scales and ones too small for any included."""
    sizes = 2.0 ** -torch.linspace(0, 24, 64).unsqueeze(1)
    return torch.cat([gaussian(64, 64) * sizes, torch.zeros(1, 64)])


def _lowest_scales():
    """Groups whose scales are the first codes, where e4m3 values lie at equal distances, and made to gain two below."""
    w = gaussian(64, 64) * 2.0 ** -torch.linspace(3, 9, 64).unsqueeze(1)
    steps = (
        torch.arange(1, 15).unsqueeze(1) * 2.0**-9
    )  # fifteen weights of 4 steps are exact, if the sixteenth is clipped
    w[1:15] = 4 * steps
    w[1:15, ::16] = 6.06 * (steps + 2.0**-9)
    w[0, 0] = 2688.0
    return w


def _few_values():
    """Groups of a few levels each, where odd scales win."""
    levels = torch.randint(1, 13, (256, 1)) / 2.0
    return torch.randint(-3, 4, (256, 48)) * levels + 0.01 * torch.randn(256, 48)


@pytest.mark.parametrize(
    "make", [lambda: gaussian(128, 256), lambda: outlier_weight(128, 256), _uneven_groups, _lowest_scales, _few_values]
)
def test_the_candidates_equal_a_sweep_over_all_scales(make):
    """Few candidates, bounds used, reach the error of all 126 positive scales in every group."""
    w = make()

    best, evaluated = searched(FMT, w, rows=1 if make is _lowest_scales else 64)

    every = [code.view(torch.float8_e4m3fn) for code in E4M3_CODES[1:127]]
    torch.testing.assert_close(best, swept(FMT, w, every), rtol=1e-5, atol=0)
    assert evaluated <= (22 if make in {_uneven_groups, _lowest_scales} else 14)


def test_the_candidates_reach_all_scales_when_the_global_scale_is_too_small():
    """With a foreign global scale under which even 448 clips, the search still equals the sweep."""
    w = gaussian(32, 64)
    params = FMT.fit(w, {"global_scale": torch.tensor(1e-3)})
    errors = [FMT.unit_errors((FMT.project(w, params) - w).square())]
    errors += [FMT.unit_errors((FMT.project(w, c.params) - w).square()) for c in FMT.candidates(w, params)]
    every = [
        FMT.unit_errors(
            (FMT.project(w, {**params, "scale": code.view(torch.float8_e4m3fn).expand(32, 4)}) - w).square()
        )
        for code in E4M3_CODES[1:127]
    ]

    torch.testing.assert_close(torch.stack(errors).amin(0), torch.stack(every).amin(0), rtol=1e-5, atol=0)


def test_bounds_are_bounds():
    """No candidate has a smaller error than the bound it states, unless it was tried before."""
    for w in (gaussian(64, 128), _uneven_groups()):
        params = FMT.fit(w, FMT.fit_shared(w))
        for candidate in FMT.candidates(w, params):
            if candidate.bound is not None:
                errors = FMT.unit_errors((FMT.project(w, candidate.params) - w).square())
                stated = candidate.bound[torch.isfinite(candidate.bound)]
                assert (errors[torch.isfinite(candidate.bound)] >= stated * (1 - 1e-5)).all()


def test_the_search_gains_what_is_known():
    """On Gaussian weights the sweep reaches 21.8 dB, 1.36 dB above the scale amax / 6."""
    w = gaussian(1024, 1024)
    best, _ = searched(FMT, w)

    found = 10 * torch.log10(w.double().square().sum() / best.sum())

    assert abs(found - 21.80) <= 0.05


def test_there_is_no_group_size():
    """Groups are 16 wide, and a spec cannot say otherwise."""
    assert FMT.spec == "nvfp4"
    with pytest.raises(FormatError, match="nvfp4 has no field group_size"):
        parse_spec("nvfp4(group_size=32)")
