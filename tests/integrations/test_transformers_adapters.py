"""Adapters of PEFT on models with lowbit's weights: they train, and are saved and loaded beside a quantized folder."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM

from lowbit.integrations.transformers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from tests.support.tiny_transformers import TOKENS, answer, llama, saved

# peft asks transformers for something by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a quantized language model."""
    plain = saved(llama(), tmp_path_factory.mktemp("plain"))
    config = LowbitConfig("awq_w4a16")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    return saved(model, tmp_path_factory.mktemp("quantized"))


def test_adapters_train_on_frozen_weights(folder):
    """A few steps lower the loss and change the adapters, while the quantized weights stay as they are."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: layer.weight.qdata.clone() for name, layer in quantized_layers(model)}
    assert model.hf_quantizer.is_trainable
    trained = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = trained(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[-1] < 0.9 * losses[0]
    after = [layer.weight.qdata for _, layer in quantized_layers(trained)]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after, strict=True))


def test_adapters_are_saved_alone_and_loaded_again(folder, tmp_path):
    """With an adapter on it, saving a model writes the adapter only; on the same folder it answers as before."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder)
    plain = answer(again)
    again.load_adapter(tmp_path)

    assert not list(tmp_path.glob("model*.safetensors"))
    assert torch.equal(answer(again), answer(model))
    assert not torch.equal(answer(again), plain)
