"""awq_w4a16: its definition by hand, its grid, its dtypes, and what a search of scales gains."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError, PartsError, WeightError
from lowbit.formats import parse_spec
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.solvers import solver
from tests.support import assert_sqnr_within, gaussian, outlier_weight, sqnr


def _parts(byte, scale, zero, dtype=torch.float32):
    return {
        "qdata": torch.tensor([[byte]], dtype=torch.uint8).view(torch.int8),
        "scale": torch.tensor([[scale]], dtype=dtype),
        "zero": torch.tensor([[zero]], dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_golden_byte(dtype):
    """Byte 0x21 with scale 0.5 and zero 0.25 is [-3.25, -2.75]: the low nibble comes first, code 8 decodes to zero."""
    fmt = AwqW4A16(group_size=2)

    assert fmt.dequantize(_parts(0x21, 0.5, 0.25, dtype), (1, 2), torch.float32).tolist() == [[-3.25, -2.75]]
    assert fmt.dequantize(_parts(0x80, 0.5, 0.25, dtype), (1, 2), torch.float32).tolist() == [[-3.75, 0.25]]


@pytest.mark.parametrize("group", [2, 4, 32, 64, 96, 192])
def test_the_grid_spans_minimum_and_maximum(group):
    """In float32 the smallest weight of a group gets code 0, the largest 15, and both come back but for rounding."""
    fmt, w = AwqW4A16(group_size=group), gaussian(5, 192)

    parts = fmt.fit(w, {})
    codes = fmt.encode(w, parts).view(5, -1, group)
    back = fmt.decode(fmt.encode(w, parts), parts).view(5, -1, group)
    groups = w.view(5, -1, group)

    assert parts["scale"].shape == parts["zero"].shape == (192 // group, 5)
    assert (codes.amin(-1) == 0).all()
    assert (codes.amax(-1) == 15).all()
    torch.testing.assert_close(back.amin(-1), groups.amin(-1), rtol=0, atol=2e-6)
    torch.testing.assert_close(back.amax(-1), groups.amax(-1), rtol=0, atol=2e-6)
    assert ((back - groups).abs() <= parts["scale"].t().unsqueeze(-1) * 0.50001).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_chosen_for_the_stored_scale(dtype):
    """Every code is the nearest one under the scale and zero as stored in 16 bits: no other code of 16 is closer."""
    fmt, w = AwqW4A16(), gaussian(16, 128, dtype=dtype)

    parts = fmt.quantize(w)
    scale, zero = (parts[name].t().float().unsqueeze(-1) for name in ("scale", "zero"))
    levels = (torch.arange(16.0) - 8) * scale.unsqueeze(-1) + zero.unsqueeze(-1)  # [16, 2, 1, 16]
    nearest = (levels - w.float().view(16, 2, 64, 1)).abs().amin(-1)
    back = fmt.dequantize(parts, (16, 128), torch.float32).view(16, 2, 64)

    assert parts["scale"].dtype == parts["zero"].dtype == dtype
    torch.testing.assert_close((back - w.float().view(16, 2, 64)).abs(), nearest, rtol=0, atol=1e-6)


def test_one_sided_and_constant_groups():
    """Groups far from zero use all 16 codes, and a constant group comes back exactly: that is what the zero is for."""
    fmt = AwqW4A16(group_size=64)
    w = 100 + gaussian(4, 128)
    w[1], w[2, :64] = 5.0, -3.0

    parts = fmt.quantize(w)
    back = fmt.dequantize(parts, (4, 128), torch.float32)

    assert torch.equal(back[1], w[1])
    assert torch.equal(back[2, :64], w[2, :64])
    assert sqnr(w[0] - 100, back[0] - 100) > 19
    assert fmt.unpack(parts["qdata"], 128)[3].unique().numel() == 16


@pytest.mark.parametrize(("make", "expected"), [(gaussian, 21.64), (outlier_weight, 18.90)])
def test_scale_search_sqnr(make, expected):
    """Six trimmed grids gain 0.7 dB over minmax on Gaussian weights (the published figure of a search is 21.4)."""
    fmt, w = AwqW4A16(), make(1024, 1024)

    found = fmt.dequantize(solver("scale_search")(w, fmt), (1024, 1024), torch.float32)

    assert_sqnr_within(w, found, expected)


def test_stochastic_rounding_is_unbiased_and_seeded():
    """The mean of many seeds is the weight, and one seed always gives the same codes."""
    fmt, w = AwqW4A16(), gaussian(4, 64)

    back = [fmt.dequantize(fmt.quantize(w, seed=seed), (4, 64), torch.float64) for seed in range(400)]
    step = fmt.quantize(w)["scale"].max()

    assert (torch.stack(back).mean(0) - w).abs().max() < 5 * step * 0.5 / 400**0.5
    assert torch.equal(fmt.quantize(w, seed=3)["qdata"], fmt.quantize(w, seed=3)["qdata"])
    assert not torch.equal(fmt.quantize(w, seed=3)["qdata"], fmt.quantize(w, seed=4)["qdata"])


def test_the_smallest_float16_weights_have_a_scale():
    """Weights near the end of float16 keep a scale above zero, so they decode to finite values next to themselves."""
    fmt, w = AwqW4A16(), (gaussian(4, 64) * 1e-7).half()

    parts = fmt.quantize(w)

    assert (parts["scale"] > 0).all()
    assert (fmt.dequantize(parts, (4, 64), torch.float32) - w.float()).abs().max() <= 2.0**-24


def test_the_largest_weights_stay_finite():
    """The span of a group may exceed float32: its scale does not."""
    fmt = AwqW4A16(group_size=2)
    w = torch.tensor([[-3e38, 3e38]])

    assert torch.isfinite(fmt.dequantize(fmt.quantize(w), (1, 2), torch.float32)).all()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "64x64"])
def test_bad_group_sizes_are_refused(value):
    """A group size is a positive whole number."""
    with pytest.raises(FormatError, match="awq_w4a16"):
        parse_spec(f"awq_w4a16(group_size={value})")


@pytest.mark.parametrize(("shape", "group"), [((4, 100), 64), ((4, 15), 5), ((4, 3), 1)])
def test_columns_that_do_not_fit_are_refused(shape, group):
    """K must be a multiple of the group and even; the error names the layer."""
    with pytest.raises(WeightError, match=r"blocks\.0: .*columns"):
        AwqW4A16(group_size=group).quantize(torch.randn(shape), where="blocks.0")


def test_wrong_parts_are_refused():
    """Scales laid out as [N, K/g], the usual mistake, are named."""
    fmt = AwqW4A16()
    parts = fmt.quantize(torch.randn(4, 128))

    with pytest.raises(PartsError, match=r"layer: scale has shape \[4, 2\], expected \[2, 4\]"):
        fmt.check({**parts, "scale": parts["scale"].t()}, (4, 128), "layer")
