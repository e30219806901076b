"""LoRA on models of diffusers with lowbit's weights: added, loaded, scaled, trained, fused and taken out again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers 0.42")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate")
pytest.importorskip("transformers", "5.0", reason="pipelines of diffusers hold models of transformers 5")
pytest.importorskip("peft", reason="diffusers loads adapters with peft")

import peft
from diffusers import FluxTransformer2DModel

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.integrations.diffusers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from lowbit.tensor import QuantizedTensor
from tests.support.same_weights import assert_same_weights
from tests.support.tiny_diffusers import answer, flux, saved

TARGETS = ["to_q", "to_k", "to_out.0", "ff.net.2"]
SPECS = ["awq_w4a16", "nvfp4", "fp8_e4m3(granularity=row)", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a plain FLUX."""
    torch.manual_seed(0)
    return saved(flux(), tmp_path_factory.mktemp("plain"))


def load(folder, spec):
    """A FLUX from a folder, quantized while it loads."""
    return FluxTransformer2DModel.from_pretrained(folder, quantization_config=LowbitConfig(spec))


def lora(rank=4):
    """A LoRA on some linears whose effect is not zero."""
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)


def state_of(model):
    """The tensors of the LoRA "style" on a model, as files have them."""
    tensors = peft.get_peft_model_state_dict(model, adapter_name="style")
    return {f"transformer.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("spec", [*SPECS, "svdquant_w4a4(rank=16,act_unsigned=true)"])
def test_adapters_are_added_scaled_and_loaded(folder, spec):
    """An adapter has its effect in proportion to its scale, none at 0, and the same when it is loaded from tensors."""
    model = load(folder, spec)
    before = answer(model)
    model.add_adapter(lora(), adapter_name="style")
    whole = answer(model)
    model.set_adapters("style", 0.0)
    none = answer(model)
    model.set_adapters("style", 0.5)
    half = answer(model)
    other = load(folder, spec)
    other.load_lora_adapter(state_of(model), prefix="transformer", adapter_name="style")

    assert torch.equal(none, before)
    assert 0.3 < (half - before).norm() / (whole - before).norm() < 0.7
    torch.testing.assert_close(answer(other), whole, rtol=1e-4, atol=1e-4)
    model.delete_adapters("style")
    torch.testing.assert_close(answer(model), before, rtol=1e-5, atol=1e-5)


def test_adapters_train(folder):
    """A few steps lower the loss and change the adapter; the quantized weights stay as they are."""
    model = load(folder, "awq_w4a16")
    before = {name: layer.weight.qdata.clone() for name, layer in quantized_layers(model)}
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, goal, losses = torch.optim.Adam(parameters, lr=3e-2), torch.zeros(1), []
    for _ in range(6):
        loss = (answer.__wrapped__(model) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[-1] < 0.95 * losses[0]
    after = {name.replace(".base_layer", ""): layer.weight.qdata for name, layer in quantized_layers(model)}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("spec", SPECS)
def test_fusing_moves_the_codes(folder, spec, tmp_path):
    """A fused adapter stays in the quantized weights, near what it did beside them, and is saved with them."""
    model = load(folder, spec)
    before = answer(model)
    model.add_adapter(lora())
    beside = answer(model)
    model.fuse_lora()
    model.unload_lora()
    fused = answer(model)

    assert all(isinstance(layer.weight, QuantizedTensor) for _, layer in quantized_layers(model))
    assert len(list(quantized_layers(model))) == 20
    assert (fused - beside).norm() < 0.5 * (beside - before).norm()
    again = FluxTransformer2DModel.from_pretrained(saved(model, tmp_path))
    assert_same_weights(model, again)


@pytest.mark.parametrize("spec", SPECS)
def test_unfusing_takes_it_out_again(folder, spec):
    """After fusing and unfusing, the model without its adapter answers nearly as before."""
    model = load(folder, spec)
    before = answer(model)
    model.add_adapter(lora())
    effect = (answer(model) - before).norm()
    model.fuse_lora()
    model.unfuse_lora()
    model.unload_lora()

    assert (answer(model) - before).norm() < 0.7 * effect


def test_fusing_into_weights_that_share_with_the_bias_is_refused(folder):
    """Where the bias holds a share of the weight, fusing is refused, and the adapter goes on working beside it."""
    model = load(folder, "svdquant_w4a4(rank=16,act_unsigned=true)")
    model.add_adapter(lora())
    beside = answer(model)

    with pytest.raises(UnsupportedError, match="leave it beside the weight"):
        model.fuse_lora()
    assert torch.equal(answer(model), beside)


def test_a_model_with_adapters_is_not_saved(folder, tmp_path):
    """diffusers would write adapters and weights under names that nothing loads: refused, with what to do instead."""
    model = load(folder, "int8")
    model.add_adapter(lora())

    with pytest.raises(CheckpointError, match="unload_lora"):
        model.save_pretrained(tmp_path)
