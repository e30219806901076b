"""Models of transformers with lowbit's weights: quantized while they load, saved, loaded again, run and taken apart."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")

from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from lowbit.formats import formats
from lowbit.integrations.hf_layers import stored_bytes
from lowbit.integrations.transformers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from lowbit.tensor import QuantizedTensor
from tests.support.same_weights import assert_same_weights
from tests.support.tiny_transformers import MAKERS, TOKENS, answer, bert, gpt2, llama, saved

FORMATS = [name for name, kind in formats().items() if kind().encodable]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=MAKERS)
def plain(request, tmp_path_factory):
    """A plain model of each kind, and the folder it is saved in."""
    torch.manual_seed(0)
    model = MAKERS[request.param]()
    return model, saved(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """The folder of a plain language model."""
    torch.manual_seed(0)
    return saved(llama(), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_is_saved_and_loaded_bit_for_bit(plain, name, tmp_path):
    """For every format and kind of model: quantized while loading, saved and loaded again, it answers the same."""
    model, folder = plain
    quantized = type(model).from_pretrained(folder, quantization_config=LowbitConfig(name), dtype=torch.float32)
    loaded = type(model).from_pretrained(saved(quantized, tmp_path), dtype=torch.float32)

    assert_same_weights(quantized, loaded)
    assert torch.equal(answer(quantized), answer(loaded))
    assert not torch.equal(answer(quantized), answer(model))
    assert isinstance(loaded.config.quantization_config, LowbitConfig)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_not_cast_to_the_dtype_of_the_model(plain, dtype, tmp_path):
    """Parts keep their dtypes (float32, E4M3 and E8M0 scales) whatever dtype the model computes in."""
    model, folder = plain
    for spec in ("fp8_e4m3(granularity=row)", "nvfp4", "mxfp8"):
        quantized = type(model).from_pretrained(folder, quantization_config=LowbitConfig(spec), dtype=torch.float32)
        target = saved(quantized, tmp_path / spec[:5])
        loaded = type(model).from_pretrained(target, dtype=dtype)

        assert_same_weights(quantized, loaded)
        assert {layer.weight.dtype for _, layer in quantized_layers(loaded)} <= {dtype, torch.float32}
        assert answer(loaded).isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, "auto"], ids=str)
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_dtype_and_device_map(llama_folder, dtype, device_map, tmp_path):
    """Every dtype, and a device map or none, gives a model of that dtype that is loaded again as it was."""
    if device_map is not None:
        pytest.importorskip("accelerate", reason="transformers places models with accelerate")
    wanted = torch.float32 if dtype == "auto" else dtype
    options = {"dtype": dtype, "device_map": device_map}
    quantized = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=LowbitConfig("awq_w4a16"), **options
    )
    loaded = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path), **options)

    assert quantized.dtype == loaded.dtype == wanted
    assert answer(loaded).dtype == wanted
    assert torch.equal(answer(quantized), answer(loaded))


def test_generate(llama_folder, tmp_path):
    """A quantized model generates, and the same after it was saved and loaded."""
    quantized = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("awq_w4a16"))
    loaded = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path))

    first = quantized.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)

    assert first.shape == (1, 16)
    assert torch.equal(first, loaded.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_what_the_preset_keeps_stays_plain(llama_folder):
    """Embeddings, head and norms stay, every linear of the blocks is quantized, and the quantizer says why."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("int8"))
    choices = model.hf_quantizer.choices

    assert not isinstance(model.lm_head.weight, QuantizedTensor)
    assert not isinstance(model.model.embed_tokens.weight, QuantizedTensor)
    assert len(dict(quantized_layers(model))) == 14
    assert "head" in choices["lm_head"].why
    assert choices["model.layers.0.mlp.up_proj"].format.name == "int8"


def test_a_layer_that_is_new_stays_plain(tmp_path):
    """A head that the files lack is made anew, stays plain, and is said to be."""
    folder = saved(bert(), tmp_path / "plain")
    config = LowbitConfig("int8", layers={"classifier": "int8"})
    model = AutoModelForTokenClassification.from_pretrained(folder, quantization_config=config, num_labels=64)

    assert not isinstance(model.classifier.weight, QuantizedTensor)
    assert model.hf_quantizer.choices["classifier"].format is None
    assert "new" in model.hf_quantizer.choices["classifier"].why
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_rules_and_modules_to_keep(llama_folder, tmp_path):
    """Rules choose formats by layer, named modules stay, and the saved folder remembers both."""
    config = LowbitConfig(
        "int8",
        layers={r"layers\.0\.mlp": "awq_w4a16", r"o_proj$": "keep", "lm_head": "fp8_e4m3(granularity=row)"},
        modules_to_not_convert=["layers.1"],
        solver="rtn",
    )
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    found = {name: layer.weight.format.spec for name, layer in quantized_layers(loaded)}

    assert found == {
        **{f"model.layers.0.self_attn.{x}_proj": "int8" for x in "qkv"},
        **{f"model.layers.0.mlp.{x}_proj": "awq_w4a16" for x in ("gate", "up", "down")},
        "lm_head": "fp8_e4m3(granularity=row)",
    }
    assert loaded.config.quantization_config.to_dict() == config.to_dict()


def test_unsigned_activations_and_the_bias_that_they_need(llama_folder, tmp_path):
    """A format that moves a constant into the bias gives its layers one, which is saved, loaded and taken out again."""
    config = LowbitConfig("svdquant_w4a4(act_unsigned=true)")
    quantized = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    loaded = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path))
    layer = loaded.model.layers[0].mlp.down_proj

    assert torch.equal(answer(quantized), answer(loaded))
    assert layer.bias.abs().sum() > 0
    loaded.dequantize()
    assert layer.bias.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["int8", "awq_w4a16", "svdquant_w4a4(rank=16,act_unsigned=true)"])
def test_the_linears_of_gpt2(name, tmp_path):
    """The linears of GPT-2, whose weights are [K, N], are quantized along K, saved and loaded bit for bit."""
    folder = saved(gpt2(), tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowbitConfig(name))
    loaded = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path / "quantized"))
    weight = loaded.transformer.h[0].mlp.c_fc.weight

    assert (tuple(weight.shape), weight.matrix) == ((128, 512), (512, 128))
    assert_same_weights(quantized, loaded)
    assert torch.equal(answer(quantized), answer(loaded))
    plain = loaded.dequantize().transformer.h[0].mlp.c_fc.weight
    original = AutoModelForCausalLM.from_pretrained(folder).transformer.h[0].mlp.c_fc.weight
    assert (plain - original).norm() < 0.2 * original.norm()


@pytest.mark.parametrize("rule", [{}, {"embed_tokens": "int8"}, {"lm_head": "int8"}], ids=str)
def test_tied_embeddings_stay_tied(rule, tmp_path):
    """Head and embedding share one weight before and after, plain or quantized, and it is stored once."""
    folder = saved(llama(tied=True), tmp_path / "plain")
    config = LowbitConfig("int8", layers=rule)
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    loaded = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path / "quantized"))

    for model in (quantized, loaded):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert isinstance(model.lm_head.weight, QuantizedTensor) == bool(rule)
    assert torch.equal(answer(quantized), answer(loaded))


def test_memory_footprint_counts_stored_bytes(llama_folder):
    """The footprint is that of the parts: below a third of the plain model's, less without buffers than with."""
    plain = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("awq_w4a16"))
    kept = sum(p.numel() * 4 for name, p in plain.named_parameters() if "proj" not in name)
    coded = plain.get_memory_footprint(return_buffers=False) - kept

    assert model.get_memory_footprint() == stored_bytes(model)
    assert model.get_memory_footprint(return_buffers=False) - kept < coded / 6
    assert model.num_parameters() == plain.num_parameters()


def test_dequantize_gives_a_plain_model(llama_folder, tmp_path):
    """`model.dequantize()` leaves plain weights of the same values, no trace in the config, and can be saved."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("awq_w4a16"))
    before = answer(model)
    plain = model.dequantize()

    assert list(quantized_layers(plain)) == []
    assert torch.allclose(answer(plain), before, atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(saved(plain, tmp_path))
    assert torch.equal(answer(loaded), answer(plain))
    assert plain.get_memory_footprint() == stored_bytes(plain)
    assert getattr(loaded.config, "quantization_config", None) is None


def test_dequantize_while_loading(llama_folder, tmp_path):
    """With `dequantize` in the folder's config the model that comes out is plain."""
    quantized = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("awq_w4a16"))
    config = copy.deepcopy(quantized.config)
    config.quantization_config = {**quantized.config.quantization_config.to_dict(), "dequantize": True}
    loaded = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path), config=config)

    assert list(quantized_layers(loaded)) == []
    assert torch.allclose(answer(loaded), answer(quantized), atol=1e-5)


def test_a_copy_answers_the_same(llama_folder):
    """A deep copy of a quantized model is a quantized model of its own."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("awq_w4a16"))
    copied = copy.deepcopy(model)

    assert torch.equal(answer(model), answer(copied))
    assert copied.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    assert copied.get_memory_footprint() == model.get_memory_footprint()


def test_a_quantized_model_compiles_whole(llama_folder):
    """A quantized model is traced as one graph and answers the same."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=LowbitConfig("int8"))
    torch.compiler.reset()
    traced = torch.compile(model, backend="eager", fullgraph=True)

    assert model.hf_quantizer.is_compileable
    assert torch.equal(answer(traced), answer(model))
