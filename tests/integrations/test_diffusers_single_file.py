"""ComfyUI's quantized files in diffusers: converted to its names, cut and joined, they mean the numbers of the file."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers 0.42")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate")
pytest.importorskip("transformers", "5.0", reason="pipelines of diffusers hold models of transformers 5")

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

import lowbit
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.errors import CheckpointError, PlanError
from lowbit.integrations.diffusers import LowbitConfig, read_single_file
from lowbit.layer_kinds import quantized_layers
from lowbit.tensor import QuantizedTensor
from lowbit.tensor.handlers import LowbitFallbackWarning
from tests.support.comfy_originals import (
    file_of,
    flux_original,
    narrow_flux_converter,
    quantized_original,
    scaled_fp8,
    sd3_original,
)
from tests.support.same_weights import assert_same_weights
from tests.support.tiny_diffusers import MAKERS, answer

SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers wants its halves in the other order
SPECS = [
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "int8",
    "nvfp4",
    "mxfp8",
    "awq_w4a16",
    "svdquant_w4a4(rank=16)",
    "svdquant_w4a4(rank=16,act_unsigned=true)",
]


@pytest.fixture(scope="module", params=MAKERS)
def published(request, tmp_path_factory):
    """A class of diffusers, the folder of its config, and the tensors of a model as they were published."""
    with pytest.MonkeyPatch.context() as patch:
        entry = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
        narrow = {**entry, "checkpoint_mapping_fn": narrow_flux_converter()}
        patch.setitem(SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel", narrow)
        torch.manual_seed(0)
        model, folder = MAKERS[request.param](), tmp_path_factory.mktemp(request.param)
        model.save_config(folder)
        made = {"flux": flux_original, "sd3": sd3_original}.get(request.param)
        state = made() if made else {name: value.detach().clone() for name, value in model.state_dict().items()}
        yield type(model), str(folder), state


def load(published, file, config="", **options):
    """A model from a file, quantized as the file or the config says; plain without a config."""
    kind, folder, _ = published
    given = {} if config is None else {"quantization_config": LowbitConfig(config or None)}
    return kind.from_single_file(file, config=folder, **given, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [*SPECS, "scaled_fp8"])
def test_converted_weights_mean_what_the_file_says(published, spec, dtype, tmp_path):
    """Fused projections are cut, halves are swapped, and every weight is that of the same file in plain numbers."""
    *_, state = published
    stored, plain = scaled_fp8(state) if spec == "scaled_fp8" else quantized_original(state, spec, also=(SWAPPED,))[:2]
    quantized = load(published, file_of(stored, tmp_path / "q.safetensors"), torch_dtype=dtype)
    expected = load(published, file_of(plain, tmp_path / "p.safetensors"), None, torch_dtype=dtype)
    layers = dict(quantized_layers(quantized))

    assert len(layers) >= 20
    for name, layer in layers.items():
        assert layer.weight.dtype == dtype
        assert layer.weight.view_of == ""
        with lowbit.use_backend("eager"):  # kernels may sum in other orders
            meant = layer.weight.dequantize(torch.float32).to(dtype)
        assert torch.equal(meant, expected.get_submodule(name).weight), name
    others = {name: value for name, value in expected.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, value in others.items():
        assert torch.equal(quantized.state_dict()[name], value), name
    if not next(iter(layers.values())).weight.format.rounds_input:
        # Other kernels do not round weights to the dtype of the activations, and would tell the two apart in bfloat16.
        with contextlib.nullcontext() if dtype == torch.float32 else lowbit.use_backend("eager"):
            torch.testing.assert_close(answer(quantized), answer(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["awq_w4a16", "svdquant_w4a4(rank=16,act_unsigned=true)"])
def test_a_converted_model_is_saved_and_loaded(published, spec, tmp_path):
    """What was cut from fused projections is saved in diffusers' own form and loaded again with the same bits."""
    kind, _, state = published
    stored, _, _ = quantized_original(state, spec)
    converted = load(published, file_of(stored, tmp_path / "q.safetensors"))
    converted.save_pretrained(tmp_path / "folder")

    assert_same_weights(converted, kind.from_pretrained(tmp_path / "folder"))


def test_a_plain_file_is_quantized_while_it_loads(published, tmp_path):
    """A file of plain weights and a config with a format: quantized after the conversion; without one, an error."""
    *_, state = published
    file = file_of(state, tmp_path / "p.safetensors")
    plain, quantized = load(published, file, None), load(published, file, "int8")

    layers = dict(quantized_layers(quantized))
    assert len(layers) >= 20
    for name, layer in layers.items():
        there = plain.get_submodule(name).weight
        assert (layer.weight.dequantize() - there).norm() < 0.01 * there.norm()
    with pytest.raises(PlanError, match="names no format"):
        load(published, file)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_file_of_plain_float8_is_taken_as_its_numbers(published, dtype, tmp_path):
    """Files whose every tensor is E4M3 without a scale: what is not quantized again gets the dtype of the model."""
    *_, state = published
    narrow = {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}
    plain = {key: value.float() for key, value in narrow.items()}
    model = load(published, file_of(narrow, tmp_path / "8.safetensors"), "int8", torch_dtype=dtype)
    expected = load(published, file_of(plain, tmp_path / "32.safetensors"), "int8", torch_dtype=dtype)

    assert_same_weights(model, expected)
    assert {value.dtype for value in model.parameters()} == {dtype or torch.float32}
    assert torch.equal(model.proj_out.weight, expected.proj_out.weight)
    assert answer(model).isfinite().all()


def test_prefix_and_header(published, tmp_path):
    """ComfyUI's prefix is taken off, and a file whose layers only its header describes is read with our reader."""
    *_, state = published
    stored, _, layers = quantized_original(state, "nvfp4")
    front = "model.diffusion_model."
    expected = load(published, file_of(stored, tmp_path / "q.safetensors"))
    assert_same_weights(expected, load(published, file_of(stored, tmp_path / "x.safetensors", prefix=front)))

    header = COMFY.header_metadata(layers, {})
    bare = {key: value for key, value in stored.items() if not key.endswith(".comfy_quant")}
    file = file_of(bare, tmp_path / "h.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match="read_single_file"):
        load(published, file)
    tensors = read_single_file(file)
    assert sum(isinstance(value, QuantizedTensor) for value in tensors.values()) == len(layers)
    assert_same_weights(expected, load(published, tensors))
    assert_same_weights(expected, load(published, dict(tensors)))  # the first load has not emptied it


def test_a_quantized_file_is_not_quantized_again(published, tmp_path):
    """A format for a file that is quantized already is refused."""
    stored, _, _ = quantized_original(published[2], "int8")

    with pytest.raises(PlanError, match="is quantized already"):
        load(published, file_of(stored, tmp_path / "q.safetensors"), "awq_w4a16")


def test_a_layer_that_does_not_fit_is_refused(published, tmp_path):
    """Another model's config, and a layer that the model does not have, are errors that name the layer."""
    kind, _, state = published
    stored, _, _ = quantized_original(state, "awq_w4a16")
    file = file_of(stored, tmp_path / "q.safetensors")
    kind.from_config({**kind.load_config(published[1]), "num_attention_heads": 8}).save_config(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"holds a weight of shape \[\d+, \d+\]"):
        kind.from_single_file(file, config=str(tmp_path / "wide"), quantization_config=LowbitConfig())
    kind.from_config({**kind.load_config(published[1]), "num_layers": 0}).save_config(tmp_path / "short")
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.0.*has no such layer"):
        kind.from_single_file(file, config=str(tmp_path / "short"), quantization_config=LowbitConfig())


@pytest.mark.filterwarnings(f"ignore::{LowbitFallbackWarning.__module__}.LowbitFallbackWarning")
def test_a_conversion_that_codes_do_not_allow_is_refused(published, tmp_path, monkeypatch):
    """Where diffusers' conversion does arithmetic on a quantized weight, the error names the operation."""
    kind, _, state = published
    entry = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]

    def scaled(checkpoint, **kwargs):
        made = entry["checkpoint_mapping_fn"](checkpoint=checkpoint, **kwargs)
        return {key: value * 2 if key.endswith("0.attn.to_q.weight") else value for key, value in made.items()}

    monkeypatch.setitem(SINGLE_FILE_LOADABLE_CLASSES, kind.__name__, {**entry, "checkpoint_mapping_fn": scaled})
    stored, _, _ = quantized_original(state, "awq_w4a16")
    stored["more"] = torch.zeros(1)  # else a file with exactly the model's names is not converted at all
    with pytest.raises(CheckpointError, match=r"aten\.mul.*to_q\.weight"):
        load(published, file_of(stored, tmp_path / "q.safetensors"))


def test_a_folded_bias_that_is_missing_is_refused(tmp_path):
    """A format that keeps a share of the weight in the bias is not loaded without one, which would be wrong."""
    model = MAKERS["qwen"]()
    model.save_config(tmp_path)
    stored, _, _ = quantized_original(dict(model.state_dict()), "svdquant_w4a4(rank=16,act_unsigned=true)")
    del stored["transformer_blocks.0.img_mlp.net.2.bias"]
    file = file_of(stored, tmp_path / "q.safetensors")

    with pytest.raises(CheckpointError, match=r"img_mlp\.net\.2.*the bias is missing"):
        type(model).from_single_file(file, config=str(tmp_path), quantization_config=LowbitConfig())
