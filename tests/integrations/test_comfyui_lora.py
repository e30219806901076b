"""LoRA on lowbit's weights inside ComfyUI: baked once, or put on at each step; right where the bias has a share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
from lowbit.formats import parse_spec
from lowbit.integrations.comfyui import is_lowbit, layout_for, lowbit_ops
from tests.support.comfy_tree import BOTH, install, loaded, same_tensors, stored_linear
from tests.support.specs import READ_ONLY_SPECS, any_parts

SPECS = (
    "awq_w4a16",
    "svdquant_w4a4(rank=16)",
    "svdquant_w4a4(rank=16,act_unsigned=true)",
    "int8(granularity=block)",
    "nvfp4",
    "convrot_w4a4",
    "w4a8_codebook",
)
UNSIGNED = "svdquant_w4a4(rank=16,act_unsigned=true)"


@pytest.fixture(params=BOTH)
def comfy(request, monkeypatch):
    """ComfyUI: the stand-in, and the source tree where there is one."""
    return install(request.param, monkeypatch)


def _change(size=2e-4):
    return size * torch.randn(128, 4) @ torch.randn(4, 256)


def _bake(linear, change, seed):
    """What ComfyUI's patcher does with a LoRA on a weight that is where it will be used."""
    weight = linear.convert_weight(linear.weight.to(torch.float32, copy=True), inplace=True)
    linear.set_weight(weight + change, inplace_update=False, seed=seed)
    return weight


def _recovered(gained, change):
    return float((gained * change).sum() / change.square().sum())


@pytest.mark.parametrize("spec", SPECS)
def test_baking_a_small_change_keeps_it(comfy, spec):
    """A LoRA far smaller than a level is in the baked weight on average; dtype and kind of the weight stay."""
    model = loaded(lowbit_ops(kernels="lowbit"), stored_linear(spec)[0])
    change = _change()
    old = _bake(model.lin, change, seed=11)

    assert is_lowbit(model.lin.weight)
    assert model.lin.weight.dtype == torch.bfloat16
    gained = model.lin.weight.to(torch.float32).dequantize() - old
    assert _recovered(gained, change) == pytest.approx(1.0, abs=0.15)


def test_baking_without_a_seed_rounds_to_nearest(comfy):
    """Without chance the codes are the nearest ones, so a change below half a level is lost."""
    model = loaded(lowbit_ops(), stored_linear("awq_w4a16")[0])
    before = model.lin.weight._qdata.clone()

    _bake(model.lin, 1e-5 * torch.ones(128, 256), seed=None)

    assert torch.equal(model.lin.weight._qdata, before)


def test_baking_is_the_same_for_the_same_seed(comfy):
    """ComfyUI's seed comes from the layer's name: loading twice gives the same picture."""
    tensors, change = stored_linear("awq_w4a16")[0], _change()
    states = []
    for seed in (5, 5, 6):
        model = loaded(lowbit_ops(), tensors)
        _bake(model.lin, change, seed)
        states.append(model.state_dict())

    assert same_tensors(states[0], states[1])
    assert not same_tensors(states[0], states[2])


def test_return_weight_leaves_the_layer_alone(comfy):
    """ComfyUI asks for a new weight without putting it in place; the layer then is as it was."""
    model = loaded(lowbit_ops(), stored_linear("awq_w4a16")[0])
    weight = model.lin.weight

    made = model.lin.set_weight(weight.dequantize() + 0.01, seed=3, return_weight=True)

    assert model.lin.weight is weight
    assert is_lowbit(made)
    assert made.dtype == weight.dtype


@pytest.mark.parametrize("spec", SPECS)
def test_a_change_at_each_step_is_exact(comfy, spec):
    """With a weight function the product is that of the decoded weight plus the change; taken off, all is as before."""
    tensors, fmt, parts, _ = stored_linear(spec, dtype=torch.float32)
    model, change, x = loaded(lowbit_ops(torch.float32, kernels="lowbit"), tensors), _change(0.01), torch.rand(6, 256)
    share = fmt.bias_share(parts)
    bias = tensors["lin.bias"] if share is None else tensors["lin.bias"] + share
    expected = x @ (fmt.dequantize(parts, (128, 256), torch.float32) + change).t() + bias
    with torch.no_grad():
        before = model(x)
        model.lin.weight_function = [lambda weight: weight + change]
        patched = model(x)
        model.lin.weight_function = []

        torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), before)


def test_the_bias_follows_a_bake_and_its_undoing(comfy):
    """After a bake that moves row sums, after its undoing, and in a file saved between, the product is right."""
    tensors, fmt, parts, _ = stored_linear(UNSIGNED, dtype=torch.float32)
    true_bias = tensors["lin.bias"].clone()
    tensors["lin.bias"] = true_bias - fmt.bias_share(parts)
    model, x = loaded(lowbit_ops(torch.float32), tensors), torch.rand(512, 256)
    backup = model.lin.weight
    change = 0.02 * torch.rand(128, 1) * torch.ones(128, 256)

    def worst(checked):
        with torch.no_grad():
            decoded = x @ checked.lin.weight.dequantize().t() + true_bias
            return float((checked(x) - decoded).mean(0).abs().max() / decoded.std())

    assert worst(model) < 0.02
    _bake(model.lin, change, seed=2)
    assert worst(model) < 0.02
    assert torch.equal(model.lin.bias, tensors["lin.bias"])
    saved = model.state_dict()
    assert not torch.equal(saved["lin.bias"], tensors["lin.bias"])
    assert worst(loaded(lowbit_ops(torch.float32), saved)) < 0.02
    model.lin.weight = nn.Parameter(backup, requires_grad=False)
    assert worst(model) < 0.02
    assert same_tensors(model.state_dict(), tensors)


def test_a_step_function_on_a_baked_layer_has_the_true_bias(comfy):
    """A LoRA at each step on top of a baked one: the decoded product uses the bias the file stood for."""
    tensors, fmt, parts, _ = stored_linear(UNSIGNED, dtype=torch.float32)
    true_bias = tensors["lin.bias"] + fmt.bias_share(parts)
    model, x = loaded(lowbit_ops(torch.float32), tensors), torch.rand(4, 256)
    _bake(model.lin, 0.02 * torch.ones(128, 256), seed=2)
    model.lin.weight_function = [lambda weight: weight]
    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ model.lin.weight.dequantize().t() + true_bias, rtol=1e-4, atol=1e-4)


def test_a_format_that_is_only_read_is_baked_as_plain_values(comfy):
    """Some GGUF blocks cannot be made again: the layer with a LoRA is decoded, runs, and is saved as plain values."""
    fmt = parse_spec(READ_ONLY_SPECS[0])
    tensors = stored_linear("awq_w4a16")[0]
    model = loaded(lowbit_ops(torch.float32), tensors)
    wrapped = layout_for(fmt).wrap(any_parts(fmt, (128, 256)), torch.float32, (128, 256))
    model.lin.weight = nn.Parameter(wrapped, requires_grad=False)
    change = _change()
    old = _bake(model.lin, change, seed=1)
    x = torch.randn(3, 256)

    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ (old + change).t() + model.lin.bias, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == {"lin.weight", "lin.bias"}


def test_weights_copied_in_place_take_their_shares_along(comfy):
    """ComfyUI's streaming copies a changed weight over the old one: the bias's share goes with it."""
    tensors = stored_linear(UNSIGNED, dtype=torch.float32)[0]
    weight = loaded(lowbit_ops(torch.float32), tensors).lin.weight.detach()
    changed = weight.requantize_from_float(weight.dequantize() + 0.02, stochastic_rounding=4)
    target = weight.clone()

    target.copy_(changed)

    assert torch.equal(target._params.own_share, changed._params.own_share)
    assert target._params.baked
    x, bias = torch.rand(4, 256), torch.zeros(128)
    assert torch.equal(nn.functional.linear(x, target, bias), nn.functional.linear(x, changed, bias))
