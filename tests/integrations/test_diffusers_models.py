"""Models of diffusers with lowbit's weights: quantized while they load, saved, loaded again, run and taken apart."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers 0.42")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate")
pytest.importorskip("transformers", "5.0", reason="pipelines of diffusers hold models of transformers 5")

from lowbit import quantize_
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import PlanError
from lowbit.formats import formats
from lowbit.integrations.diffusers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from lowbit.tensor import QuantizedTensor
from tests.support.same_weights import assert_same_weights
from tests.support.tiny_diffusers import MAKERS, answer, flux, qwen, saved

FORMATS = [name for name, kind in formats().items() if kind().encodable and kind().check_shape(64, 64) is None]
DTYPES = [None, torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=MAKERS)
def plain(request, tmp_path_factory):
    """A plain model of each kind, and the folder it is saved in."""
    torch.manual_seed(0)
    model = MAKERS[request.param]()
    return model, saved(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a plain FLUX."""
    torch.manual_seed(0)
    return saved(flux(), tmp_path_factory.mktemp("plain"))


def load(folder, spec=None, **options):
    """A FLUX from a folder, quantized while it loads where a spec says so."""
    from diffusers import FluxTransformer2DModel

    config = {} if spec is None else {"quantization_config": LowbitConfig(spec)}
    return FluxTransformer2DModel.from_pretrained(folder, **config, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["awq_w4a16", "nvfp4", "mxfp8", "fp8_e4m3(granularity=row)", "svdquant_w4a4(rank=16)"])
def test_a_quantized_model_is_saved_and_loaded_bit_for_bit(plain, spec, dtype, tmp_path):
    """Every model in every dtype, or none given: what was quantized while loading comes back with the same bits."""
    model, folder = plain
    quantized = type(model).from_pretrained(folder, quantization_config=LowbitConfig(spec), torch_dtype=dtype)
    loaded = type(model).from_pretrained(saved(quantized, tmp_path), torch_dtype=dtype)

    assert_same_weights(quantized, loaded)
    assert loaded.dtype == (dtype or torch.float32)
    torch.testing.assert_close(answer(loaded), answer(quantized), rtol=1e-5, atol=1e-5)
    error = (answer(loaded).float() - answer(model)).norm() / answer(model).norm()
    assert 1e-4 < error < 0.03
    assert loaded.is_quantized
    assert loaded.quantization_method == "lowbit"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(folder, name, tmp_path):
    """Every format that can hold the layers is made while loading, as `quantize_` makes it, and comes back."""
    quantized = load(folder, name)
    by_hand = load(folder)
    quantize_(by_hand, {f"^{layer}$": name for layer, _ in quantized_layers(quantized)})
    loaded = load(saved(quantized, tmp_path))

    assert len(list(quantized_layers(quantized))) >= 10
    assert_same_weights(quantized, by_hand)
    assert_same_weights(quantized, loaded)


def test_parts_are_never_cast(folder, tmp_path):
    """Scales in float32, E4M3 and E8M0 keep their dtype whatever dtype the model is loaded in."""
    for spec in ("fp8_e4m3(granularity=row)", "nvfp4", "mxfp8"):
        target = saved(load(folder, spec, torch_dtype=torch.float32), tmp_path / spec[:5])
        loaded = load(target, torch_dtype=torch.bfloat16)

        assert_same_weights(load(target, torch_dtype=torch.float32), loaded)
        assert {layer.weight.dtype for _, layer in quantized_layers(loaded)} == {torch.bfloat16}


def test_a_saved_folder_is_one_of_lowbit(folder, tmp_path):
    """A saved folder is found quantized in the comfy dialect, passes `verify`, and its config.json names the method."""
    target = saved(load(folder, "awq_w4a16"), tmp_path)
    fields = json.loads((target / "config.json").read_text())

    assert fields["quantization_config"] == {"quant_method": "lowbit", "format": "awq_w4a16"}
    with open_source(folder) as source, open_source(target) as result:
        held = look_for_layers(result, result.components[0])
        report = verify(source, result)
    assert held.dialect.name == "comfy"
    assert len(held.layers) == 20
    assert report.problems == ()


def test_layers_may_be_spread_over_files(folder, tmp_path):
    """In a sharded folder the tensors of one layer lie in different files; they are put together again."""
    quantized = load(folder, "nvfp4", torch_dtype=torch.bfloat16)
    quantized.save_pretrained(tmp_path, max_shard_size="20KB")
    where = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    apart = [key for key in where if where.get(key.replace("weight", "weight_scale"), where[key]) != where[key]]
    loaded = load(tmp_path, torch_dtype=torch.bfloat16)

    assert apart
    assert_same_weights(quantized, loaded)


def test_rules_presets_and_names_decide(folder):
    """The preset's layers stay plain, rules and names except others, and the quantizer says why."""
    config = LowbitConfig(
        "awq_w4a16", layers={r"ff\.net": "int8"}, modules_to_not_convert=["single_transformer_blocks"]
    )
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=config)
    made = {name: layer.weight.format.name for name, layer in quantized_layers(model)}

    assert made["transformer_blocks.0.ff.net.2"] == "int8"
    assert made["transformer_blocks.0.attn.to_q"] == "awq_w4a16"
    assert not any(name.startswith(("single", "x_embedder", "proj_out", "time_text")) for name in made)
    assert "modules_to_not_convert" in model.hf_quantizer.choices["single_transformer_blocks.0.proj_mlp"].why
    assert "output" in model.hf_quantizer.choices["proj_out"].why


def test_layers_that_diffusers_keeps_in_float32_stay(folder, monkeypatch):
    """What a class of diffusers keeps in float32 is not quantized, and keeps its dtype."""
    from diffusers import FluxTransformer2DModel

    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", ["proj_mlp"])
    model = load(folder, "awq_w4a16", torch_dtype=torch.bfloat16)

    assert model.single_transformer_blocks[0].proj_mlp.weight.dtype == torch.float32
    assert not isinstance(model.single_transformer_blocks[0].proj_mlp.weight, QuantizedTensor)
    assert isinstance(model.single_transformer_blocks[0].proj_out.weight, QuantizedTensor)


def test_a_format_that_moves_the_bias(tmp_path):
    """Unsigned activations: the share in the bias is folded once, survives saving, and is given back."""
    model = qwen()
    spec = "svdquant_w4a4(rank=16,act_unsigned=true)"
    config = LowbitConfig("svdquant_w4a4(rank=16)", layers={r"mlp\.net\.2": spec})
    quantized = type(model).from_pretrained(saved(model, tmp_path / "plain"), quantization_config=config)
    loaded = type(model).from_pretrained(saved(quantized, tmp_path / "out"))
    plain, layer = model.transformer_blocks[1].img_mlp.net[2], loaded.transformer_blocks[1].img_mlp.net[2]

    assert_same_weights(quantized, loaded)
    share = layer.weight.format.bias_share(layer.weight.in_layout("").parts)
    torch.testing.assert_close(layer.bias, plain.bias - share)
    assert (answer(loaded) - answer(model)).norm() < 0.03 * answer(model).norm()
    loaded.dequantize()
    torch.testing.assert_close(layer.bias, plain.bias)


def test_the_footprint_counts_parts(folder):
    """The memory footprint is that of the parts and the plain parameters together."""
    model, whole = load(folder, "awq_w4a16", torch_dtype=torch.bfloat16), load(folder, torch_dtype=torch.bfloat16)
    weights = [layer.weight for _, layer in quantized_layers(model)]
    saving = sum(2 * weight.numel() - weight.nbytes_stored() for weight in weights)

    assert saving > 0
    assert model.get_memory_footprint() == whole.get_memory_footprint() - saving


def test_dequantize(folder, tmp_path):
    """A dequantized model is a plain one that answers alike, is saved as one, and can be cast again."""
    model = load(folder, "nvfp4", torch_dtype=torch.bfloat16)
    before = answer(model)
    plain = model.dequantize()

    assert list(quantized_layers(plain)) == []
    assert not plain.is_quantized
    torch.testing.assert_close(answer(plain), before, rtol=0.02, atol=0.02)
    again = load(saved(plain, tmp_path), torch_dtype=torch.bfloat16)
    assert torch.equal(again.proj_out.weight, plain.proj_out.weight)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert plain.to(torch.float32).dtype == torch.float32


def test_moving_and_casting(folder):
    """A quantized model moves between devices and is copied; diffusers itself refuses to cast it."""
    model = load(folder, "awq_w4a16", torch_dtype=torch.bfloat16)
    copied = copy.deepcopy(model).to("cpu")

    assert torch.equal(answer(copied), answer(model))
    assert copied.get_memory_footprint() == model.get_memory_footprint()
    assert all(layer.weight.is_meta for _, layer in quantized_layers(copy.deepcopy(model).to("meta")))
    for cast in (lambda: model.to(torch.float16), model.half, model.float):
        with pytest.raises(ValueError, match="quantized model"):
            cast()


def test_a_copy_is_saved_as_it_is(folder, tmp_path):
    """A deep copy has a quantizer of its own: saving it writes its weights, not those of the original."""
    model = load(folder, "int8")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.proj_out.bias.fill_(7)

    assert (load(saved(copied, tmp_path)).proj_out.bias == 7).all()


def test_a_pickled_model_is_whole(folder, tmp_path):
    """A model that went through a pickle counts its own memory and saves its own weights."""
    model = load(folder, "awq_w4a16")
    again = pickle.loads(pickle.dumps(model))
    assert again.get_memory_footprint() == model.get_memory_footprint()
    del model

    assert_same_weights(again, load(saved(again, tmp_path)))


def test_a_dropped_model_frees_its_memory(folder):
    """Nothing keeps a model alive that is dropped: its memory is free at once, not at the next garbage collection."""
    model = load(folder, "int8")
    weight = weakref.ref(model.single_transformer_blocks[0].proj_out)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_compiled_blocks(folder):
    """Blocks compile without a break in the graph, and answer the same."""
    model = load(folder, "awq_w4a16")
    before = answer(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")

    assert model.hf_quantizer.is_compileable
    torch.testing.assert_close(answer(model), before)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(folder, device_map, tmp_path):
    """Device maps place a model on one device; parts of it cannot be offloaded, which is said at once."""
    quantized = load(folder, "awq_w4a16", device_map=device_map)
    loaded = load(saved(quantized, tmp_path), device_map=device_map)

    assert_same_weights(quantized, loaded)
    for places in ({"": "cpu", "proj_out": "disk"}, {"": "cuda:0", "proj_out": "cpu"}):
        with pytest.raises(PlanError, match="cannot be offloaded"):
            load(folder, "awq_w4a16", device_map=places)
