"""Folders of quantized models: those that transformers saves for lowbit's tools, those of lowbit for transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")

from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.inspection import inspect
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import CheckpointError, PartsError, WeightError
from lowbit.integrations.transformers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from tests.support.tiny_transformers import answer, bert, llama, saved

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a plain language model."""
    torch.manual_seed(0)
    return saved(llama(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """A model that was quantized while it loaded, and the folder it is saved in."""
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=LowbitConfig("awq_w4a16"))
    return model, saved(model, tmp_path_factory.mktemp("quantized"))


@pytest.fixture
def copied(quantized, tmp_path):
    """A copy of the quantized folder, to be damaged."""
    return shutil.copytree(quantized[1], tmp_path / "copied")


def set_config(folder, **fields):
    """Change fields of a folder's config.json; None takes a field out."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text("utf-8")), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8")


def convert_folder(source_folder, target, spec):
    """A model folder converted by lowbit, with the entry in config.json that transformers needs."""
    with open_source(source_folder) as source:
        convert(source, target, make_plan(source, spec), jobs=1)
    set_config(target, quantization_config={"quant_method": "lowbit"})
    return target


def test_the_saved_folder_is_one_that_lowbit_reads(quantized, plain, tmp_path):
    """What `save_pretrained` wrote is inspected, verified against its source, loaded and decoded by lowbit itself."""
    model, folder = quantized
    with open_source(folder) as source, open_source(plain) as original:
        report = inspect(source)
        check = verify(original, source)
        dequantize(source, tmp_path / "decoded")
    other = llama()
    load(other, folder)

    assert not report.problems
    assert not check.problems
    assert len(check.layers) == 14
    assert torch.equal(answer(other), answer(model))
    set_config(tmp_path / "decoded", quantization_config=None)
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    assert torch.allclose(answer(decoded), answer(model), atol=1e-5)


def test_sharded_folders(quantized, tmp_path):
    """Saved in many small files, a model is loaded again bit for bit, by transformers and by lowbit."""
    model, _ = quantized
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    other = llama()
    load(other, tmp_path)

    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path)), answer(model))
    assert torch.equal(answer(other), answer(model))


@pytest.mark.parametrize("spec", ["awq_w4a16", "mxfp8", "int8(rotation=0)"])
def test_a_folder_that_lowbit_converted_is_loaded(spec, tmp_path):
    """A folder of `lowbit convert` answers as the model that transformers quantized while loading it, bit for bit."""
    model = bert()
    folder = saved(model, tmp_path / "plain")
    converted = convert_folder(folder, tmp_path / "converted", spec)
    loaded = AutoModel.from_pretrained(converted)
    quantized = AutoModel.from_pretrained(folder, quantization_config=LowbitConfig(spec))

    assert torch.equal(answer(loaded), answer(quantized))
    again = AutoModel.from_pretrained(saved(loaded, tmp_path / "again"))
    assert torch.equal(answer(again), answer(loaded))


def test_a_model_without_its_head_and_with_another_one(quantized):
    """The base model, and one with a new head, are loaded from the folder of a causal model."""
    model, folder = quantized
    base = AutoModel.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)

    assert len(list(quantized_layers(base))) == len(list(quantized_layers(classifier))) == 14
    with torch.no_grad():
        assert torch.equal(model.lm_head(answer(base)), answer(model))


def test_a_base_model_is_loaded_into_one_with_a_head(plain, tmp_path):
    """Layers of a folder without the base model's prefix find their places in a model that has it."""
    base = AutoModel.from_pretrained(plain, quantization_config=LowbitConfig("awq_w4a16"))
    model = AutoModelForCausalLM.from_pretrained(saved(base, tmp_path))

    assert torch.equal(answer(model.model), answer(base))


def test_a_config_beside_a_quantized_folder_is_passed_over(quantized):
    """Another config given with a quantized folder changes nothing, and transformers says so."""
    model, folder = quantized
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowbitConfig("int8"))

    assert torch.equal(answer(loaded), answer(model))


def test_experts_are_decoded_where_transformers_merges_them(tmp_path, caplog):
    """Quantized experts become one plain bank, with a warning; the rest stays quantized, and it all can be saved."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    folder = saved(MixtralForCausalLM(config).eval(), tmp_path / "plain")
    converted = convert_folder(folder, tmp_path / "converted", "awq_w4a16")
    with open_source(converted) as source:
        dequantize(source, tmp_path / "decoded")
    set_config(tmp_path / "decoded", quantization_config=None)
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    with caplog.at_level("WARNING", "lowbit"):
        loaded = AutoModelForCausalLM.from_pretrained(converted)
    again = AutoModelForCausalLM.from_pretrained(saved(loaded, tmp_path / "again"))

    assert "experts.0.w1" in caplog.text
    assert len(list(quantized_layers(loaded))) == len(list(quantized_layers(again))) == 8
    for name in ("gate_up_proj", "down_proj"):
        bank = getattr(loaded.model.layers[1].mlp.experts, name)
        assert torch.equal(bank, getattr(decoded.model.layers[1].mlp.experts, name))
    assert torch.equal(answer(again), answer(loaded))
    assert torch.allclose(answer(loaded), answer(decoded), atol=1e-5)


def test_merged_layers_that_need_a_bias_are_refused(tmp_path):
    """An expert whose format moves a constant into the bias cannot be merged, as a bank has none."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = saved(MixtralForCausalLM(config), tmp_path / "plain")
    converted = convert_folder(folder, tmp_path / "converted", "svdquant_w4a4(rank=16,act_unsigned=true)")

    assert "experts.0.w" in refused(converted, "moves a constant into the bias")


# ---- folders that are not right -------------------------------------------------------------------------------------


def refused(folder, pattern, kind=CheckpointError):
    """The message of the one error that loading a folder gives."""
    with pytest.raises(kind, match=pattern) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert folder.name in str(caught.value)
    return str(caught.value)


def rewrite(folder, change):
    """Change the tensors of a folder's file by a function of the dictionary."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_layer_without_its_scale(copied):
    """A missing scale is named with its layer and file."""
    rewrite(copied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))

    assert "model.layers.1.mlp.up_proj" in refused(copied, "weight_scale", PartsError)


def test_a_scale_of_another_shape(copied):
    """A scale of the wrong shape is named with its layer and file."""
    name = "model.layers.1.mlp.up_proj.weight_scale"
    rewrite(copied, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))

    assert "model.layers.1.mlp.up_proj" in refused(copied, r"\[1, 256\]", PartsError)


def test_a_whole_layer_missing(copied):
    """A layer that other blocks have, and one does not, is an error and not a layer of random values."""
    gone = "model.layers.1.mlp.up_proj."
    rewrite(copied, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(gone)])

    refused(copied, r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight', which other blocks have")


def test_a_plain_layer_missing(copied):
    """The same for a layer that is not quantized."""
    rewrite(copied, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))

    refused(copied, r"lacks 'model\.layers\.0\.input_layernorm\.weight'")


def test_a_shallower_model(copied):
    """A layer that the model has no place for is named."""
    set_config(copied, num_hidden_layers=1)

    assert "model.layers.1" in refused(copied, "LlamaForCausalLM has no")


def test_a_model_of_another_width(copied):
    """A layer of another shape is named with both shapes, even where mismatched sizes are to be ignored."""
    set_config(copied, intermediate_size=512)

    assert "[128, 256]" in refused(copied, r"\[128, 512\]")
    with pytest.raises(CheckpointError, match="down_proj"):
        AutoModelForCausalLM.from_pretrained(copied, ignore_mismatched_sizes=True)


def test_a_plain_folder_that_says_it_is_quantized(plain, tmp_path):
    """A config that names the method beside plain weights is an error that says how to get rid of it."""
    folder = shutil.copytree(plain, tmp_path / "plain")
    set_config(folder, quantization_config={"quant_method": "lowbit"})

    refused(folder, "remove quantization_config")


def test_weights_that_are_not_finite(plain, tmp_path):
    """A NaN in a weight is lowbit's error, naming the layer, and not one of transformers about a conversion."""
    folder = shutil.copytree(plain, tmp_path / "nan")
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: tensors[name].__setitem__((3, 5), float("nan")))

    with pytest.raises(WeightError, match=r"^model\.layers\.1\.self_attn\.q_proj: holds NaN"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowbitConfig("int8"))
