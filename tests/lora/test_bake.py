"""Baking adapters into modules: what comes through, biases that move along, and taking it out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import FormatError, UnsupportedError, WeightError
from lowbit.formats.parts import raw_bytes
from lowbit.lora import DoraDelta, LoraDelta, attach_lora, bake_lora
from lowbit.lora.adapter_delta import Delta
from tests.lora.models import FORMATS, adapter, model
from tests.support import gaussian


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a module as bytes, quantized weights part by part."""
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        parts = value.parts if isinstance(value, QuantizedTensor) else {"": value.detach()}
        found |= {f"{name} {part}": raw_bytes(tensor).clone() for part, tensor in parts.items()}
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two modules held the same bytes."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rounding", [None, "error_feedback", "stochastic"])
def test_baked_layers_have_the_change_and_unbake_exactly(rounding):
    """Every layer has most of its change, the account says how, and unbake restores every bit."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    before = bits(block)
    weights = {name: getattr(block, name).weight.dequantize() for name in FORMATS}

    handle = bake_lora(block, adapter(0.1), rounding=rounding)

    for name, delta in adapter(0.1).items():
        gained = getattr(block, name).weight.dequantize() - weights[name]
        share = float((gained * delta.dense()).sum() / delta.dense().square().sum())
        assert share == pytest.approx(handle.layers[name].recovered, abs=5e-3)
        assert 0.9 < share < 1.1
    assert handle.recovered > 0.9
    if rounding is None:
        assert handle.layers["down"].method == "low_rank"
        assert block.down.weight.format.rank == 32  # 16 and 4, up to a multiple of 16
        assert handle.layers["down"].noise < 1e-2
    handle.unbake()

    assert same(bits(block), before)
    with pytest.raises(UnsupportedError, match="unbaked already"):
        handle.unbake()


def test_low_rank_baking_is_the_side_branch():
    """On svdquant layers the default bake computes what the branch at run time does."""
    block, x = model(torch.bfloat16), torch.randn(8, 128).abs().bfloat16()
    lowbit.quantize_(block, FORMATS)
    delta = {"down": adapter(0.3)["down"]}
    with torch.no_grad(), attach_lora(block, delta):
        beside = block.down(x)
    bake_lora(block, delta)

    with torch.no_grad():
        assert float((block.down(x) - beside).norm() / beside.norm()) < 5e-3


@pytest.mark.parametrize("rounding", ["error_feedback", "stochastic", "nearest"])
def test_biases_of_unsigned_activations_follow_the_weight(rounding):
    """The stored bias holds a share of the weight; after baking it is the share of the new one."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    layer = block.down
    true_bias = layer.bias + layer.weight.format.bias_share(layer.weight.in_layout("").parts)
    old = layer.bias.clone()

    bake_lora(block, {"down": adapter(0.5)["down"]}, rounding=rounding)

    assert not torch.equal(layer.bias, old)
    torch.testing.assert_close(layer.bias + layer.weight.format.bias_share(layer.weight.in_layout("").parts), true_bias)
    x = nn.functional.gelu(torch.randn(64, 128))
    exact = nn.functional.linear(x, layer.weight.dequantize(), true_bias)
    assert float(((layer(x) - exact).norm() / exact.norm()).detach()) < 0.12  # what 4-bit activations lose


def test_bakes_come_out_in_the_opposite_order():
    """Two bakes nest: the first cannot be taken out before the second, then both restore every bit."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    states = [bits(block)]
    first = bake_lora(block, adapter(0.1, seed=1))
    states.append(bits(block))
    second = bake_lora(block, adapter(0.1, seed=2, names=("up",)), -1.0)

    with pytest.raises(UnsupportedError, match="unbake that one first"):
        first.unbake()
    second.unbake()
    assert same(bits(block), states[1])
    first.unbake()
    assert same(bits(block), states[0])


def test_originals_need_not_be_kept():
    """Without them nothing is held, and unbake says so."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    handle = bake_lora(block, adapter(0.1), keep_original=False)

    with pytest.raises(UnsupportedError, match="no originals were kept"):
        handle.unbake()


def test_plain_layers_embeddings_and_convolutions_are_baked_too():
    """Layers that are not quantized get the change in their own dtype; an embedding and a convolution as matrices."""
    module = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16), nn.Embedding(48, 64), nn.Conv2d(4, 8, 3))
    matrix = adapter(0.2, names=("out",))["out"]
    kernel = LoraDelta(torch.randn(2, 4, 3, 3), torch.randn(8, 2))
    before = [layer.weight.detach().clone() for layer in module]
    lowbit.quantize_(module[1], "int8(activations=none)")

    handle = bake_lora(module, {"0": matrix, "1": matrix, "2": kernel})

    assert [handle.layers[name].method for name in "02"] == ["plain", "plain"]
    assert handle.recovered > 0.9
    torch.testing.assert_close(module[0].weight, (before[0].float() + matrix.dense()).bfloat16())
    assert float((module[1].weight.dequantize() - before[1] - matrix.dense()).norm() / before[1].norm()) < 0.02
    expected = before[2] + torch.einsum("or,rihw->oihw", kernel.up, kernel.down)
    torch.testing.assert_close(module[2].weight, expected)
    handle.unbake()
    assert torch.equal(module[2].weight, before[2])


def test_tied_weights_stay_tied():
    """Layers that share a weight share the baked one, and the original after unbake."""
    table, head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
    head.weight = table.weight
    module = nn.ModuleDict({"table": table, "head": head})
    lowbit.quantize_(module, "int8")
    original = table.weight

    handle = bake_lora(module, {"head": adapter(names=("out",))["out"]})

    assert head.weight is table.weight
    assert head.weight is not original
    handle.unbake()
    assert head.weight is table.weight is original


def test_the_default_takes_nearest_where_that_loses_nothing():
    """A change of many levels is rounded to nearest, which adds the least noise; a small one is fed back."""
    block = model()
    lowbit.quantize_(block, {"out": "int8"})
    large = bake_lora(block, adapter(1.0, names=("out",)))
    large.unbake()
    small = bake_lora(block, adapter(0.002, names=("out",)))

    assert large.layers["out"].method == "nearest"
    assert small.layers["out"].method == "error_feedback"
    assert small.layers["out"].recovered > 0.9


def test_what_cannot_be_baked_is_refused_before_anything_changes():
    """Unknown roundings, formats without a low rank, ranks beyond the shape, changes that are not finite."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    before = bits(block)
    broken = LoraDelta(torch.full((1, 64), torch.inf), torch.ones(48, 1))
    wide = LoraDelta(torch.ones(60, 128), torch.ones(64, 60))
    for changes, rounding, kind, complaint in [
        (adapter(), "up", FormatError, "unknown rounding 'up'; known are low_rank, error_feedback"),
        (adapter(names=("up",)), "low_rank", FormatError, "up: awq_w4a16 has no low-rank branch"),
        ({"down": wide}, None, FormatError, "down: .*use rounding='error_feedback'"),
        ({"out": broken}, None, WeightError, "out: the change holds NaN or infinity"),
    ]:
        with pytest.raises(kind, match=complaint):
            bake_lora(block, changes, rounding=rounding)

    assert same(bits(block), before)


def test_kernel_layouts_are_kept():
    """A weight that was repacked for a kernel is baked, and packed that way again."""
    layer = nn.Linear(128, 128)
    lowbit.quantize_(layer, "svdquant_w4a4(rank=16)")
    packed = layer.weight.in_layout("kitchen_tile_packed_w4a4")
    layer.weight = nn.Parameter(packed, requires_grad=False)
    delta = LoraDelta(gaussian(4, 128, seed=1), gaussian(128, 4, seed=2) * 0.01)

    bake_lora(layer, {"": delta})

    assert layer.weight.kernel_layout == packed.kernel_layout
    gained = layer.weight.dequantize() - packed.dequantize()
    assert float((gained - delta.dense()).norm() / delta.dense().norm()) < 1e-2


@pytest.mark.parametrize(
    ("spec", "bad"),
    [(None, "range"), *((spec, bad) for spec in (None, "int8", "svdquant_w4a4") for bad in ("factor", "magnitude"))],
)
def test_changes_that_are_not_finite_are_refused(spec, bad):
    """NaN, infinity and what float16 cannot hold spoil no weight, quantized or not, and leave the module as it was."""
    block = nn.Sequential(nn.Linear(64, 128, dtype=torch.float16))
    if spec is not None:
        lowbit.quantize_(block, spec)
    before = bits(block)
    delta: Delta = LoraDelta(torch.ones(2, 64), torch.full((128, 2), 1e5 if bad == "range" else 1.0))
    if bad == "factor":
        delta.down[1, 3] = float("inf")
    if bad == "magnitude":
        delta = DoraDelta(delta, torch.full((128,), float("nan")), by_row=True)

    with pytest.raises(WeightError, match="range of float16" if bad == "range" else "0: the change holds NaN"):
        bake_lora(block, {"0": delta})
    assert same(bits(block), before)
