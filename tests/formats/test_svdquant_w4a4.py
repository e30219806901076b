"""svdquant_w4a4: made from a weight alone, searched, run with 4-bit activations, shifted where these are unsigned."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit.dispatch import use_backend
from lowbit.errors import FormatError, WeightError
from lowbit.formats import parse_spec, svdquant_w4a4
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.numerics.int4_matmul import round_groups
from lowbit.ops import linear
from lowbit.solvers import solver
from tests.support import assert_sqnr_within, gaussian, outlier_weight, sqnr

FMT = SvdquantW4A4()


def outlier_columns(n=512, k=512):
    """A weight with every 37th column twelve times larger: each spoils the scale of its group."""
    w = gaussian(n, k)
    w[:, ::37] *= 12
    return w


def decoded(fmt, parts, w):
    """The effective weight in float32."""
    return fmt.dequantize(parts, tuple(w.shape), torch.float32)


def test_decodes_by_its_definition():
    """A hand-made layer of one group: two's complement nibbles, low first, over smooth, plus the low-rank product."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0] = 0x2F  # column 0: -1, column 1: 2
    smooth = torch.ones(64)
    smooth[0], smooth[1], smooth[2] = 4.0, 0.5, 0.0
    down, up = torch.zeros(64, 1), torch.tensor([[3.0]])
    down[1], down[2] = 10.0, 1.0
    parts = {
        "qdata": codes.view(torch.int8),
        "scale": torch.tensor([[0.5]]),
        "smooth_factor": smooth,
        "proj_down": down,
        "proj_up": up,
    }

    row = SvdquantW4A4(rank=1).dequantize(parts, (1, 64), torch.float32)[0]

    assert row[:4].tolist() == [-1 * 0.5 / 4, 2 * 0.5 / 0.5 + 30, 3.0, 0.0]


def test_round_to_nearest_stays_within_seven():
    """Without a search every scale is absmax / 7 of what the low rank leaves, and codes reach -7 and 7, never -8."""
    w = gaussian(128, 256)
    parts = FMT.quantize(w)
    codes = FMT.unpack(parts["qdata"], 256)

    assert (codes.min(), codes.max()) == (-7, 7)
    assert (codes.view(128, 4, 64).abs().amax(-1) == 7).all()
    assert (parts["scale"] > 0).all()


@pytest.mark.parametrize(("rank", "expected"), [(1, 20.91), (32, 21.48)])
def test_scale_search_sqnr(rank, expected):
    """A signed search of scales: 20.9 dB on Gaussian weights, the published figure, and more with a low rank of use."""
    fmt, w = SvdquantW4A4(rank=rank), gaussian(1024, 1024)

    assert_sqnr_within(w, decoded(fmt, solver("scale_search")(w, fmt), w), expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_scale_search_is_never_worse_by_row(backend):
    """The search starts from the weight as the same backend rounds it and moves only where the squared error falls."""
    if backend == "cpu":
        pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)
    for w in (
        gaussian(64, 128),
        outlier_weight(64, 128),
        torch.zeros(64, 128),
        gaussian(64, 128, dtype=torch.bfloat16),
    ):
        with use_backend(backend):
            before, after = (decoded(FMT, solver(name)(w, FMT), w) - w.float() for name in ("rtn", "scale_search"))

        assert (after.square().sum(1) <= before.square().sum(1) * (1 + 1e-5) + 1e-12).all()


def test_outlier_columns_cost_little():
    """Where single columns ruin plain int4, smoothing and the low rank win back more than 10 dB."""
    w = outlier_columns()
    plain = sqnr(w, round_groups(w))

    assert plain < 13
    assert sqnr(w, decoded(FMT, FMT.quantize(w), w)) > plain + 10


def test_smoothing_helps_where_the_low_rank_cannot():
    """More outlier columns than rank: with smoothing the layer's output is better than without, by more than 1 dB."""
    fmt = SvdquantW4A4(rank=1)
    w = gaussian(256, 512) * torch.exp(torch.randn(512, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(256, 512)
    parts = fmt.quantize(w)
    plain = {"smooth_factor": torch.ones(512), "proj_down": parts["proj_down"] * parts["smooth_factor"].unsqueeze(1)}
    unsmoothed = fmt.quantize(w, params=fmt.fit(w, plain))

    assert parts["smooth_factor"].std() > 0.1
    assert sqnr(x @ w.t(), fmt.linear(x, parts, None)) > sqnr(x @ w.t(), fmt.linear(x, unsmoothed, None)) + 1


@pytest.mark.parametrize("make", [gaussian, outlier_weight, outlier_columns])
def test_refining_beats_not_refining(make, monkeypatch):
    """Fitting the low rank to what rounding loses gains at least 0.2 dB on any weight, and 1 dB on a Gaussian one."""
    w = make(512, 512)
    refined = sqnr(w, decoded(FMT, FMT.quantize(w), w))
    monkeypatch.setattr(svdquant_w4a4, "REFINEMENTS", 0)
    monkeypatch.setattr(svdquant_w4a4, "TURNS", 0)
    unrefined = sqnr(w, decoded(FMT, FMT.quantize(w), w))

    assert refined > unrefined + (1.0 if make is gaussian else 0.2)


def test_a_low_rank_weight_is_nearly_exact():
    """A weight of rank 20 needs no codes to speak of: rank 32 holds it to bfloat16's precision."""
    w = gaussian(256, 20) @ gaussian(20, 192, seed=1)

    assert sqnr(w, decoded(FMT, FMT.quantize(w), w)) > 50
    assert sqnr(w.bfloat16().float(), decoded(FMT, FMT.quantize(w.bfloat16()), w)) > 50


def test_a_higher_rank_is_better():
    """Each doubling of the rank lowers the error of a trained-like weight."""
    w = outlier_weight(256, 256)
    formats = [SvdquantW4A4(rank=rank) for rank in (8, 16, 32, 64)]
    found = [sqnr(w, decoded(fmt, fmt.quantize(w), w)) for fmt in formats]

    assert found == sorted(found)


def test_is_deterministic():
    """The same weight gives the same bytes, whatever the state of the global generator."""
    w = gaussian(96, 128)
    first = FMT.quantize(w)
    torch.manual_seed(99)

    assert all(torch.equal(part, first[name]) for name, part in FMT.quantize(w).items())


@pytest.mark.parametrize("scale", [28.0, 1e-3])
def test_float16_never_overflows(scale):
    """Weight scales of 28, as real checkpoints have, with float16 tensors and inputs: sums stay finite and right."""
    n, k, fmt = 64, 1024, SvdquantW4A4(rank=2)
    parts = {
        "qdata": torch.full((n, k // 2), 0x77, dtype=torch.uint8).view(torch.int8),
        "scale": torch.full((k // 64, n), scale).half(),
        "smooth_factor": torch.ones(k).half(),
        "proj_down": torch.zeros(k, 2).half(),
        "proj_up": torch.zeros(n, 2).half(),
    }
    x = torch.ones(3, k)
    x[:, :64], x[:, k // 2 :] = 2, -1  # the sum passes 576 * 7 * 28 > 65504 on its way to 64 * 7 * 28
    expected = x @ decoded(fmt, parts, torch.empty(n, k)).t()

    y = fmt.linear(x.half(), parts, None)

    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)])
def test_linear_is_the_product_of_what_was_quantized(unsigned, lead):
    """Against float64: quantized input times decoded residual, plus the low rank of the raw input, plus the bias."""
    fmt, w = SvdquantW4A4(rank=8, act_unsigned=unsigned), gaussian(96, 128)
    parts, bias = fmt.quantize(w), torch.randn(96)
    x = F.gelu(torch.randn(*lead, 128)) if unsigned else torch.randn(*lead, 128)

    smooth, rows = parts["smooth_factor"].double(), x.reshape(-1, 128).double()
    groups = ((rows + 0.171875 if unsigned else rows) / smooth).view(-1, 2, 64)
    scale = groups.abs().amax(-1, keepdim=True) / (15 if unsigned else 7)
    quantized = (groups / scale).round().mul(scale).view(-1, 128)
    residual = fmt.unpack(parts["qdata"], 128).double().view(96, 2, 64) * parts["scale"].t().double().unsqueeze(-1)
    expected = quantized @ residual.view(96, 128).t()
    expected += rows @ parts["proj_down"].double() @ parts["proj_up"].double().t() + bias.double()

    y = fmt.linear(x, parts, bias)

    assert y.shape == (*lead, 96)
    torch.testing.assert_close(y.double().reshape(-1, 96), expected, rtol=1e-5, atol=2e-5)


def test_the_shift_of_unsigned_activations_is_accounted_for():
    """The stored bias and the flag belong together: kernel, op and dequantized paths agree, every mistake shows."""
    fmt = SvdquantW4A4(rank=32, act_unsigned=True)
    w, x, true_bias = gaussian(256, 512), F.gelu(torch.randn(64, 512)), torch.randn(256)
    parts = fmt.quantize(w)
    share = fmt.bias_share(parts)
    stored = true_bias - share
    expected = x @ w.t() + true_bias

    def lost(y):
        return float((y - expected).norm() / expected.norm())

    right = lost(fmt.linear(x, parts, stored))
    dense = lost(F.linear(x, decoded(fmt, parts, w), stored + share))
    signed = SvdquantW4A4(rank=32)
    flag_lost, plain_bias = lost(signed.linear(x, parts, stored)), lost(fmt.linear(x, parts, true_bias))

    assert share.shape == (256,)
    assert share.dtype == torch.float32
    assert lost(linear(x, [parts[name] for name in fmt.part_names], stored, fmt.spec)) == pytest.approx(right, rel=1e-6)
    assert dense < right
    assert flag_lost > 1.3 * right
    assert plain_bias > 1.3 * right
    assert signed.bias_share(parts) is None


def test_the_share_is_the_shift_times_the_decoded_rows():
    """bias_share is 0.171875 times the row sums of the 4-bit weight over smooth, without channels switched off."""
    fmt = SvdquantW4A4(rank=4, act_unsigned=True)
    parts = fmt.quantize(gaussian(64, 128))
    parts["smooth_factor"][5] = 0
    parts["proj_up"].zero_()

    dense = fmt.dequantize(parts, (64, 128), torch.float64)

    torch.testing.assert_close(fmt.bias_share(parts).double(), 0.171875 * dense.sum(1), rtol=1e-5, atol=1e-6)


def test_unsigned_codes_beat_signed_ones_after_a_gelu():
    """Sixteen levels above zero instead of seven: the layer's output gains more than 1 dB."""
    w, x = gaussian(256, 512), F.gelu(torch.randn(128, 512))
    fmt = SvdquantW4A4(act_unsigned=True)
    parts = fmt.quantize(w)

    unsigned = sqnr(x @ w.t(), fmt.linear(x, parts, -fmt.bias_share(parts)))

    assert unsigned > sqnr(x @ w.t(), FMT.linear(x, FMT.quantize(w), None)) + 1


def test_gradients_reach_the_input():
    """The input's gradient is that of the effective weight, the rounding of activations passed straight through."""
    w = gaussian(96, 128)
    weight = lowbit.QuantizedTensor.quantize(w, FMT)
    x = torch.randn(5, 128, requires_grad=True)

    F.linear(x, weight, torch.zeros(96)).sum().backward()

    torch.testing.assert_close(x.grad, torch.ones(5, 96) @ weight.dequantize(), rtol=1e-4, atol=1e-4)


def test_zero_rows_and_columns():
    """Empty columns and rows decode to zeros, beside others that are not disturbed."""
    w = gaussian(64, 128)
    w[3], w[:, 70] = 0, 0

    back = decoded(FMT, FMT.quantize(w), w)

    assert (back[3] == 0).all()
    assert back[:, 70].abs().max() < 0.2
    assert sqnr(w, back) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rtn", "scale_search"])
def test_non_finite_weights_name_the_layer(value, name):
    """A NaN or an infinity is one error that names the layer, not a failure inside a decomposition."""
    w = gaussian(64, 128)
    w[40, 7] = value

    with pytest.raises(WeightError, match=r"blocks\.3\.fc2: holds NaN or infinity"):
        solver(name)(w, FMT, where="blocks.3.fc2")


def test_factors_beyond_float16_are_an_error():
    """A float16 weight whose low-rank factors overflow is refused rather than stored with infinities."""
    w = torch.full((64, 4096), 60000.0).half()

    with pytest.raises(WeightError, match="low-rank factors exceed float16"):
        FMT.quantize(w)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((64, 100), "multiple of the group size 64"), ((16, 128), "less than 32 rows"), ((64, 0), "no columns")],
)
def test_shapes_that_do_not_fit_are_refused(shape, message):
    """K must be a multiple of 64 and the rank no larger than the weight; the error says what to do."""
    with pytest.raises(WeightError, match=rf"blocks\.0: .*{message}"):
        FMT.quantize(torch.zeros(shape), where="blocks.0")


@pytest.mark.parametrize("text", ["rank=0", "rank=-1", "rank=true", "rank=1.5", "act_unsigned=1", "act_unsigned=maybe"])
def test_bad_fields_are_refused(text):
    """The rank is a positive whole number, act_unsigned true or false."""
    with pytest.raises(FormatError, match="svdquant_w4a4"):
        parse_spec(f"svdquant_w4a4({text})")
