"""LoRA at run time: what the branch adds, how it comes and goes, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.lora import LoraDelta, attach_lora
from tests.lora.models import FORMATS, adapter, model

SPECS = ["fp8_e4m3", "int8", "awq_w4a16", "nvfp4", "mxfp8", "svdquant_w4a4(rank=16,act_unsigned=true)"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_branch_adds_the_change_of_the_raw_input(spec, dtype):
    """The layer's own output, from its own kernel, plus x down^T up^T of the input as it came."""
    layer, delta = nn.Linear(64, 48, dtype=dtype), adapter(names=("out",))["out"]
    lowbit.quantize_(layer, spec)
    x = torch.randn(3, 5, 64).to(dtype)
    before, weight = layer(x), layer.weight

    attach_lora(layer, {"": delta}, 0.7)
    after = layer(x)

    assert layer.weight is weight
    added = (after.float() - before.float()).detach()
    expected = F.linear(x.float(), delta.dense(0.7))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert float((added - expected).norm() / expected.norm()) < tolerance
    assert after.dtype == dtype


def test_a_pre_quant_scale_is_not_seen_by_the_branch():
    """A format that scales its input first gets the branch's share of the input before that."""
    fmt = lowbit.parse_spec("int8(pre_quant_scale=true)")
    w = torch.randn(48, 64)
    parts = {**fmt.plain.quantize(w), "pre_quant_scale": torch.linspace(0.5, 2, 64)}
    layer, delta = nn.Linear(64, 48, bias=False), adapter(names=("out",))["out"]
    layer.weight = nn.Parameter(QuantizedTensor(parts, fmt, (48, 64), torch.float32), requires_grad=False)
    x = torch.randn(5, 64)
    before = layer(x)

    with attach_lora(layer, {"": delta}):
        torch.testing.assert_close(layer(x) - before, F.linear(x, delta.dense()), atol=1e-4, rtol=1e-4)


def test_half_precision_input_to_a_bfloat16_model():
    """The branch computes in the dtype of its input, as the quantized layer does."""
    layer, delta = nn.Linear(64, 48, dtype=torch.bfloat16), adapter(names=("out",))["out"]
    lowbit.quantize_(layer, "awq_w4a16")
    x = torch.randn(5, 64).half()
    before = layer(x)
    with attach_lora(layer, {"": delta}):
        after = layer(x)

    assert after.dtype == before.dtype == torch.float16
    expected = F.linear(x.float(), delta.dense())
    assert float((after.detach().float() - before.detach().float() - expected).norm() / expected.norm()) < 2e-2


def test_several_adapters_strengths_and_removal():
    """Adapters add up, strengths can change at any time, and removal leaves exactly what was there."""
    block, x = model(), torch.randn(6, 64)
    lowbit.quantize_(block, FORMATS)
    before, names, keys = block(x), [name for name, _ in block.named_modules()], list(block.state_dict())
    classes = [type(layer) for layer in block.modules()]

    first = attach_lora(block, adapter(seed=1), 0.5)
    alone = block(x)
    second = attach_lora(block, adapter(seed=2, names=("up",)), 2.0)
    both = block(x)
    second.strength = 0.0
    silenced = block(x)
    assert list(block.state_dict()) == keys
    second.strength = 2.0
    torch.testing.assert_close(block(x), both)
    first.remove()
    only_second = block(x)
    second.remove()
    second.remove()

    torch.testing.assert_close(silenced, alone)
    assert not torch.allclose(only_second, both, atol=1e-3)
    assert torch.equal(block(x), before)
    assert [name for name, _ in block.named_modules()] == names
    assert [type(layer) for layer in block.modules()] == classes
    assert not any(layer._forward_hooks for layer in block.modules())
    with pytest.raises(UnsupportedError, match="was removed"):
        second.strength = 1.0


def test_gradients_reach_the_input():
    """The branch takes part in the gradient of the input; nothing of the adapter is trained."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    delta = adapter(names=("out",))["out"]
    x = torch.randn(4, 64, requires_grad=True)
    block.out(x).sum().backward()
    without = x.grad.clone()
    x.grad = None
    with attach_lora(block, {"out": delta}):
        block.out(x).sum().backward()

    torch.testing.assert_close(x.grad - without, delta.dense().sum(0).expand(4, 64), atol=1e-4, rtol=1e-3)


@pytest.mark.real_empty
def test_compiled_modules_follow():
    """A module compiled before or after gets the branch; a change of strength recompiles nothing."""
    block, x = model(), torch.randn(6, 64)
    lowbit.quantize_(block, FORMATS)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    handle = attach_lora(block, adapter())
    torch.testing.assert_close(compiled(x), block(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(compiled(x), before, atol=1e-3)

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    handle.strength = 0.25
    torch.testing.assert_close(compiled(x), block(x), atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    handle.remove()
    torch.testing.assert_close(compiled(x), before)


def test_copies_and_conversions_keep_the_branch():
    """A deep copy, another dtype and a plain weight beside quantized ones work as without adapters."""
    block, x = model(), torch.randn(6, 64)
    lowbit.quantize_(block, {"down": "int8"})
    attach_lora(block, adapter())
    after = block(x)

    assert torch.equal(copy.deepcopy(block)(x), after)
    low = block.to(torch.bfloat16)(x.bfloat16()).detach().float()
    assert float((low - after.detach()).norm() / after.detach().norm()) < 0.05
    assert block.up.lora_branch.down.dtype == torch.bfloat16


def test_convolutions_have_branches_too():
    """Strides, padding and quantized kernels: the branch is the convolution with the change's kernel."""
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect")
    delta = LoraDelta(torch.randn(2, 4, 3, 3), torch.randn(8, 2), scale=0.3)
    whole = copy.deepcopy(layer)
    with torch.no_grad():
        whole.weight += delta.dense().view(8, 4, 3, 3)
    x = torch.randn(2, 4, 9, 9)
    attach_lora(layer, {"": delta})

    torch.testing.assert_close(layer(x), whole(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x[0]), whole(x[0]), atol=1e-4, rtol=1e-4)


def test_layers_without_a_product_are_refused_in_words():
    """An embedding has no input to multiply: refused with the layer's name and the remedy, nothing attached."""
    module = nn.Sequential(nn.Embedding(48, 64), nn.Linear(64, 48))
    delta = adapter(names=("out",))["out"]

    with pytest.raises(UnsupportedError, match=r"0: is Embedding, .*bake"):
        attach_lora(module, {"1": delta, "0": delta})
    assert not hasattr(module[1], "lora_branch")
    with pytest.raises(CheckpointError, match="no finite number"):
        attach_lora(module, {"1": delta}, float("nan"))
    with pytest.raises(CheckpointError, match="none of its 1 layers"):
        attach_lora(module, {"2": LoraDelta(torch.ones(1, 64), torch.ones(48, 1))})
