"""Quantized banks inside the experts of transformers, and its Conv1D: nothing in the models is changed."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.experts import QuantizedBank, quantize_bank
from tests.support import sqnr

transformers = pytest.importorskip("transformers")

MIXTRAL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
GPT_OSS = {**MIXTRAL, "head_dim": 32, "layer_types": ["full_attention"]}


def _experts(model):
    (module,) = (m for m in model.modules() if type(m).__name__.endswith("Experts"))
    return module


def _quantize(model, spec):
    """The banks of a model, quantized in place; returns a plain twin with what they decode to."""
    module, plain = _experts(model), copy.deepcopy(model)
    for name, parameter in list(module.named_parameters()):
        if parameter.dim() == 3:
            turned = bool(getattr(module, "is_transposed", False))
            bank = quantize_bank(parameter, spec, transposed=turned, where=name)
            setattr(module, name, nn.Parameter(bank, requires_grad=False))
            _experts(plain).get_parameter(name).data.copy_(bank.dequantize())
    return plain


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("kind", "options"), [("Mixtral", MIXTRAL), ("GptOss", GPT_OSS)], ids=["mixtral", "gpt-oss"])
def test_experts_of_transformers_run_on_banks(kind, options, implementation):
    """Each way in which transformers runs its experts gives what the decoded weights give, without dequantizing."""
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in _experts(model).parameters():
        nn.init.normal_(parameter, std=0.05)
    plain, tokens = _quantize(model, "nvfp4"), torch.randint(32, (2, 7))
    for each in (model, plain):
        each.set_experts_implementation(implementation)
    before = lowbit.fallbacks()

    with torch.no_grad():
        out, expected = model(tokens).logits, plain(tokens).logits

    assert isinstance(_experts(model).down_proj, QuantizedBank)
    assert sqnr(expected, out) > 60
    assert lowbit.fallbacks() == before


def test_the_conv1d_of_gpt2_is_a_linear():
    """quantize_ turns its weight over: close to the original, trained through, and no dequantizing."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    plain, tokens = copy.deepcopy(model), torch.randint(32, (2, 7))
    before = lowbit.fallbacks()

    changes = {change.name: change for change in lowbit.quantize_(model, "int8(activations=none)")}
    out = model(tokens, labels=tokens)
    out.loss.backward()

    layer = model.transformer.h[0].mlp.c_fc
    assert changes["transformer.h.0.mlp.c_fc"].format is not None
    assert isinstance(layer.weight, QuantizedTensor)
    assert layer.weight.shape == (64, 256)
    assert layer.weight.matrix == (256, 64)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sqnr(plain(tokens).logits, out.logits) > 30
    assert layer.bias.grad is not None
    assert lowbit.fallbacks() == before
    assert torch.equal(layer.weight.merge(torch.zeros(64, 256), seed=None), layer.weight)


def test_a_shift_of_activations_goes_into_the_bias_of_a_conv1d():
    """act_unsigned folds its constant into the bias, as in a linear with the same weight."""
    conv1d = transformers.pytorch_utils.Conv1D(64, 128)
    linear = nn.Linear(128, 64)
    linear.weight.data.copy_(conv1d.weight.data.t())
    linear.bias.data.copy_(conv1d.bias.data)
    x = nn.functional.gelu(torch.randn(5, 128))

    for layer in (conv1d, linear):
        lowbit.quantize_(layer, "svdquant_w4a4(rank=8,act_unsigned=true)")

    assert torch.equal(conv1d.bias, linear.bias)
    torch.testing.assert_close(conv1d(x), linear(x))
