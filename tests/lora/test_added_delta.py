"""A change added to quantized weights: how much of it survives each rounding, in every format."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError, WeightError
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.numerics.levels import E2M1, E4M3, E5M2, IntegerLevels
from lowbit.solvers.added_delta import add_delta
from lowbit.solvers.rounding_cells import cells
from tests.support import gaussian

N, K, RANK = 192, 256, 4
SPECS = [
    "int8",
    "int8(granularity=tensor)",
    "int8(granularity=block,block_size=64x64)",
    "int8(rotation=64)",
    "int8(pre_quant_scale=true)",
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "fp8_e5m2(granularity=row)",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "awq_w4a16",
    "wna16(group_size=64)",
    "convrot_w4a4(rotation=64)",
    "svdquant_w4a4(rank=16)",
    "wna16(act_order=true,group_size=64)",
    "wna16(bits=3,group_size=32)",
    "wna16(bits=4,group_size=32,zero_point=true)",
    "w4a8_codebook(rotation=64)",
    "w4a8_codebook(bits=6,rotation=64,codebook=false)",
    "gguf(type=Q4_0)",
    "gguf(type=Q4_1)",
    "gguf(type=Q5_0)",
    "gguf(type=Q5_1)",
    "gguf(type=Q8_0)",
    "gguf(type=MXFP4)",
    "gguf(type=Q2_K)",
    "gguf(type=Q3_K)",
    "gguf(type=Q4_K)",
    "gguf(type=Q5_K)",
    "gguf(type=Q6_K)",
    "gguf(type=NVFP4)",
]


def weight(spec: str):
    """A quantized Gaussian weight: format, parts and what they mean."""
    fmt = parse_spec(spec)
    parts = fmt.plain.quantize(gaussian(N, K, seed=1) * 0.02)
    if fmt.pre_quant_scale:
        parts["pre_quant_scale"] = torch.linspace(0.5, 2.0, K)
    return fmt, parts, fmt.dequantize(parts, (N, K), torch.float32)


def change(size: float, seed: int = 0) -> torch.Tensor:
    """A change of low rank whose standard deviation is `size` times that of the weights."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn((N, RANK), generator=generator) @ torch.randn((RANK, K), generator=generator)
    return delta * (0.02 * size / delta.std())


def with_room():
    """An int8 weight whose codes leave room on both sides: format and parts."""
    fmt, w = parse_spec("int8"), gaussian(N, K, seed=1) * 0.02
    return fmt, fmt.quantize(w, params={"scale": fmt.quantize(w)["scale"] * 2})


def recovered(fmt, parts, before, delta) -> float:
    """<new - old, change> / <change, change>."""
    gained = fmt.dequantize(parts, (N, K), torch.float32) - before
    return float((gained * delta).sum() / delta.square().sum())


@pytest.mark.parametrize("spec", SPECS)
def test_small_changes_survive(spec):
    """Of a change of 2 % of the weights, error feedback and, on average, stochastic rounding keep 90 % and more."""
    fmt, parts, before = weight(spec)
    delta = change(0.02)

    fed_back = add_delta(fmt, parts, delta, rounding="error_feedback")
    chances = [add_delta(fmt, parts, delta, rounding="stochastic", seed=seed) for seed in range(3)]

    fmt.check(fed_back.parts, (N, K))
    assert recovered(fmt, fed_back.parts, before, delta) == pytest.approx(fed_back.recovered, abs=2e-3)
    assert 0.9 <= fed_back.recovered <= 1.1
    assert 0.9 <= sum(added.recovered for added in chances) / 3 <= 1.1


@pytest.mark.parametrize("spec", ["int8", "awq_w4a16", "wna16(group_size=64)", "svdquant_w4a4(rank=16)", "mxfp4"])
def test_nearest_loses_small_changes(spec):
    """A change of 0.2 % of the weights is gone after rounding to nearest, and there with the other two."""
    fmt, parts, _ = weight(spec)
    delta = change(0.002)
    found = {r: add_delta(fmt, parts, delta, rounding=r).recovered for r in ("nearest", "stochastic", "error_feedback")}

    assert found["nearest"] < 0.02
    assert found["stochastic"] > 0.8  # one draw
    assert found["error_feedback"] > 0.88


@pytest.mark.parametrize("spec", SPECS)
def test_no_change_changes_nothing(spec):
    """Adding zeros leaves what every code means as it is, whatever the rounding."""
    fmt, parts, before = weight(spec)
    for rounding in ("nearest", "stochastic", "error_feedback"):
        added = add_delta(fmt, parts, torch.zeros(N, K), rounding=rounding)

        assert torch.equal(fmt.dequantize(added.parts, (N, K), torch.float32), before)
        assert (added.recovered, added.error, added.refitted) == (1.0, 0.0, 0)


@pytest.mark.parametrize("spec", SPECS)
def test_large_changes_grow_the_scales(spec):
    """A change of three times the weights does not clip: scales grow, at an error near that of quantizing anew."""
    fmt, parts, before = weight(spec)
    delta = change(3.0)

    added = add_delta(fmt, parts, delta)

    assert 0 < added.refitted <= added.clipped <= added.units
    fresh = fmt.plain.dequantize(fmt.plain.quantize(before + delta), (N, K), torch.float32)
    lost = (fresh - before - delta).square().sum() / delta.square().sum()
    assert min(0.95, 1 - 1.5 * float(lost)) < added.recovered < 1.05  # two bits with the least error are too small
    assert added.error < max(3 * float(lost), 0.03)  # a smoothing or low rank made for the old weight is kept
    assert recovered(fmt, added.parts, before, delta) == pytest.approx(added.recovered, abs=2e-3)


def test_scales_stay_where_the_change_fits():
    """A small change leaves the scales of units that do not clip bit for bit, and most codes."""
    fmt, parts, _ = weight("awq_w4a16")
    added = add_delta(fmt, parts, change(0.005))
    same_scales = (added.parts["scale"] == parts["scale"]).float().mean()
    same_codes = (raw_bytes(added.parts["qdata"]) == raw_bytes(parts["qdata"])).float().mean()

    assert float(same_scales) == pytest.approx(1 - added.refitted / added.units, abs=1e-6)
    assert added.refitted < 0.2 * added.units
    assert same_codes > 0.7


def test_subtracting_moves_the_same_codes_back():
    """Error feedback is its own inverse on evenly spaced codes with nothing clipped."""
    fmt, parts = with_room()
    delta = change(0.02)

    there = add_delta(fmt, parts, delta)
    back = add_delta(fmt, there.parts, -delta)

    assert there.clipped == 0
    assert not torch.equal(there.parts["qdata"], parts["qdata"])
    assert torch.equal(back.parts["qdata"], parts["qdata"])


def test_error_feedback_keeps_the_sum_of_a_row():
    """With a change of one sign, every row as a whole is off by less than one level."""
    fmt, parts = with_room()
    delta = change(0.02).abs()
    added = add_delta(fmt, parts, delta)
    gained = (added.parts["qdata"].float() - parts["qdata"].float()).sum(1) * parts["scale"][:, 0]

    assert ((gained - delta.sum(1)).abs() <= parts["scale"][:, 0] * (1 + 1e-4)).all()


def test_groups_of_zeros_take_a_change():
    """Where a group held nothing, its scale has no use and is made for the change."""
    for spec in ("mxfp4", "nvfp4", "int8", "awq_w4a16"):
        fmt, w = parse_spec(spec), gaussian(64, 128, seed=2)
        w[5] = 0.0
        parts = fmt.quantize(w)
        delta = torch.zeros(64, 128)
        delta[5] = 0.1 * gaussian(1, 128, seed=3)[0]

        added = add_delta(fmt, parts, delta)

        assert added.recovered > 0.9, spec


BESIDE = ("mxfp4", "nvfp4", "awq_w4a16", *(spec for spec in SPECS if spec.startswith("gguf")))


@pytest.mark.parametrize("spec", BESIDE)
def test_zeros_beside_other_weights_take_a_change(spec):
    """They are too few for the whole to be fitted anew, and express as much of a change of theirs as the others do."""
    fmt, w, zeros = parse_spec(spec), gaussian(16, 4096, seed=2) * 0.02, slice(256, 512)
    w[:, zeros] = 0.0
    parts = fmt.quantize(w)
    delta = 0.002 * (gaussian(16, RANK, seed=3) @ gaussian(RANK, 4096, seed=4))

    added = add_delta(fmt, parts, delta)

    gained = fmt.dequantize(added.parts, (16, 4096), torch.float32)[:, zeros]
    wanted = delta[:, zeros]
    assert 0.9 < (gained * wanted).sum() / wanted.square().sum() < 1.1
    assert added.refitted < added.units


@pytest.mark.parametrize("levels", [IntegerLevels(-8, 7), E2M1, E4M3, E5M2], ids=str)
def test_cells_enclose_every_value(levels):
    """The two neighbours are levels, enclose the value, and nothing lies between them."""
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.randn(4000) * 40, torch.tensor([0.0, -0.0, 1e6, -1e6])])
    low, high = cells(levels, x)
    inside = (x >= low) & (x <= high)
    middle = (low + high) / 2

    assert torch.equal(levels.round_(low.clone()), low)
    assert torch.equal(levels.round_(high.clone()), high)
    ends = levels.round_(torch.tensor([-1e9, 1e9]))
    assert bool((inside | (x < ends[0]) | (x > ends[1])).all())
    nearest = levels.round_(middle.clone())
    assert bool(((nearest == low) | (nearest == high)).all())


def test_bad_input_is_refused():
    """A rounding that is not known, a change that is not finite or of another shape: errors that name the layer."""
    fmt, parts, _ = weight("int8")
    with pytest.raises(FormatError, match="net: unknown rounding 'up'; known are error_feedback"):
        add_delta(fmt, parts, torch.zeros(N, K), rounding="up", where="net")
    with pytest.raises(WeightError, match="net: the change holds NaN"):
        add_delta(fmt, parts, torch.full((N, K), torch.nan), where="net")
    with pytest.raises(WeightError, match=r"net: a change of shape \[3, 256\]"):
        add_delta(fmt, parts, torch.zeros(3, K), where="net")
