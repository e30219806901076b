"""PEFT on quantized weights: training through them, merging into them and taking the adapter out again."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import UnsupportedError
from lowbit.lora import attach_lora, read_adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else PEFT looks for
    peft = pytest.importorskip("peft")

SPECS = ["int8", "fp8_e4m3(granularity=row)", "awq_w4a16(group_size=32)", "nvfp4"]


class Net(nn.Module):
    """Two linears with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 64] -> [..., 32]."""
        return self.down(nn.functional.silu(self.up(x)))


def net(spec: str | None = None) -> Net:
    """The same weights each time, quantized or not."""
    torch.manual_seed(0)
    made = Net()
    if spec is not None:
        lowbit.quantize_(made, spec)
    return made


def with_adapter(module: nn.Module, *, random: bool = False):
    """The module in PEFT with adapters of rank 8 on both linears."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=not random)
    wrapped = peft.get_peft_model(module, config)
    if random:  # of the size that training gives them
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(0.3)
    return wrapped


def trained(module: nn.Module) -> tuple[float, float]:
    """The loss before and after a short training of the adapters toward a shifted copy of the plain net."""
    teacher = net()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in (teacher.up, teacher.down):
            n, k = layer.weight.shape
            shift = torch.randn((n, 4), generator=generator) @ torch.randn((4, k), generator=generator)
            layer.weight += shift * (0.5 * layer.weight.norm() / shift.norm())
    x = torch.randn((512, 64), generator=generator)
    wanted = teacher(x).detach() + 0.3 * torch.randn((512, 32), generator=generator)  # noise: no adapter can learn it
    wrapped = with_adapter(module)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(wrapped(x), wanted)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def test_training_through_frozen_weights_reaches_the_loss_of_plain_ones():
    """Adapters on int8, fp8 and 4-bit weights end within 2 % of the loss that those on float32 weights reach."""
    before, plain = trained(net())

    assert plain < 0.6 * before
    for spec in ("int8(activations=none)", "fp8_e4m3(granularity=row)", "awq_w4a16(group_size=32)"):
        assert trained(net(spec))[1] < 1.02 * plain, spec


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_the_adapters_and_nothing_else(spec):
    """PEFT takes the layers for the linears that they are; only its own factors get gradients."""
    wrapped = with_adapter(net(spec), random=True)
    layer = wrapped.base_model.model.up
    wrapped(torch.randn(4, 64)).square().mean().backward()

    assert isinstance(layer, peft.tuners.lora.Linear)
    assert isinstance(layer.base_layer.weight, QuantizedTensor)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("safe", [False, True])
def test_merging_keeps_the_change(spec, safe):
    """merge_adapter requantizes: the weights stay quantized and have 90 % of the change; unmerge takes it out."""
    wrapped = with_adapter(net(spec), random=True).eval()
    layer = wrapped.base_model.model.up
    weight = layer.base_layer.weight
    before, change = weight.dequantize(), layer.get_delta_weight("default").detach()

    wrapped.merge_adapter(safe_merge=safe)
    merged = layer.base_layer.weight.dequantize()
    wrapped.unmerge_adapter()
    after = layer.base_layer.weight.dequantize()

    assert isinstance(layer.base_layer.weight, QuantizedTensor)
    assert layer.base_layer.weight.format == weight.format
    assert 0.9 < float(((merged - before) * change).sum() / change.square().sum()) < 1.1
    assert abs(float(((after - before) * change).sum() / change.square().sum())) < 0.1


def test_merging_into_a_weight_whose_bias_knows_it_is_refused():
    """With unsigned activations the stored bias would have to follow: refused in words, nothing changed."""
    module = net()
    lowbit.quantize_(module, {"down": "svdquant_w4a4(rank=16,act_unsigned=true)"})
    wrapped = with_adapter(module, random=True)
    x = torch.randn(4, 64)
    before = wrapped(x).detach()

    with pytest.raises(UnsupportedError, match=r"lowbit\.lora\.bake_lora"):
        wrapped.base_model.model.down.merge()
    torch.testing.assert_close(wrapped(x).detach(), before)


def test_what_peft_saves_is_read_with_its_scale(tmp_path):
    """A trained adapter, saved by PEFT, attached to the quantized module: the same output as in PEFT."""
    wrapped = with_adapter(net("int8"), random=True).eval()
    x = torch.randn(4, 64)
    expected = wrapped(x).detach()
    wrapped.save_pretrained(tmp_path)
    module = net("int8")

    attach_lora(module, read_adapter(tmp_path))

    torch.testing.assert_close(module(x).detach(), expected, atol=1e-5, rtol=1e-5)


def test_setting_data_never_leaves_stale_parts():
    """`weight.data = other` takes the other weight's parts; plain data for a quantized weight is refused."""
    first, second = net("int8").up, net("fp8_e4m3").up
    weight = copy.deepcopy(first.weight)
    weight.data = second.weight.data

    assert torch.equal(weight.dequantize(), second.weight.dequantize())
    assert weight.format == second.weight.format
    with pytest.raises(UnsupportedError, match="assign a new parameter"):
        weight.data = torch.zeros(128, 64)
