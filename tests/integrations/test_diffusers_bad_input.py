"""Folders and configs that diffusers is given and that do not fit each give one error, which names what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", "0.42", reason="needs diffusers 0.42")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate")
pytest.importorskip("transformers", "5.0", reason="pipelines of diffusers hold models of transformers 5")

from diffusers import FluxTransformer2DModel

from lowbit.errors import CheckpointError, DependencyError, FormatError, LowbitError, PlanError, WeightError
from lowbit.integrations.diffusers import LowbitConfig, register, registration
from lowbit.layer_kinds import quantized_layers
from tests.support.same_weights import assert_same_weights
from tests.support.tiny_diffusers import flux, saved

# diffusers says so of every model that is loaded with a config although its folder has one.
TWO_CONFIGS = "ignore:You passed `quantization_config` or equivalent parameters:UserWarning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a plain FLUX."""
    torch.manual_seed(0)
    return saved(flux(), tmp_path_factory.mktemp("plain"))


def load(folder, spec=None, **options):
    """A FLUX from a folder, quantized while it loads where a spec says so."""
    config = {} if spec is None else {"quantization_config": LowbitConfig(spec)}
    return FluxTransformer2DModel.from_pretrained(folder, **config, **options)


@pytest.fixture
def broken(folder, tmp_path):
    """A function that changes the tensors of a quantized folder, and returns the folder."""

    def change(edit):
        target = saved(load(folder, "awq_w4a16"), tmp_path)
        path = target / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        edit(state)
        save_file(state, tmp_path / "new", metadata={"format": "pt"})
        (tmp_path / "new").replace(path)  # the old file may still be mapped
        return target

    return change


LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop(f"{LAYER}.weight_scale"), rf"{LAYER}.*scale"),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith(LAYER)], rf"lacks {LAYER}\.weight, {LAYER}\.bias"),
        (lambda s: s.pop("proj_out.weight"), r"lacks proj_out\.weight"),
        (
            lambda s: s.update({key.replace("to_q", "to_x"): s.pop(key) for key in list(s) if key.startswith(LAYER)}),
            r"to_x.*FluxTransformer2DModel has no",
        ),
        (
            lambda s: s.update({f"{LAYER}.weight": s[f"{LAYER}.weight"][:32].clone()}),
            rf"{LAYER}.*\[32",
        ),
        (
            lambda s: s.update(_swapped(s)),
            r"ff\.net\.0\.proj.*holds a weight of shape \[64, 256\].*has \[256, 64\]",
        ),
    ],
    ids=["part", "layer", "plain", "unknown", "rows", "shape"],
)
def test_a_folder_that_does_not_fit_is_refused(broken, edit, message):
    """A missing part or layer, one too many, and a wrong shape each give one error that names it."""
    with pytest.raises(LowbitError, match=message):
        load(broken(edit))


def _swapped(state):
    """The tensors of two layers of different shapes, exchanged."""
    one, other = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"
    first = {key.replace(one, other): value for key, value in state.items() if key.startswith(f"{one}.weight")}
    second = {key.replace(other, one): value for key, value in state.items() if key.startswith(f"{other}.weight")}
    return first | second


def test_a_plain_folder_that_claims_to_be_quantized_is_refused(folder, tmp_path):
    """A config.json that promises quantized layers which no file has is an error, not a plain model."""
    target = saved(load(folder), tmp_path)
    fields = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "lowbit"}}))

    with pytest.raises(CheckpointError, match="no layer in the weight files is"):
        load(target)


def test_a_folder_that_does_not_say_so_is_loaded(folder, tmp_path):
    """A quantized folder whose config.json is silent is loaded with a config without a format, and only with that."""
    quantized = load(folder, "awq_w4a16")
    target = saved(quantized, tmp_path)
    fields = json.loads((target / "config.json").read_text())
    del fields["quantization_config"]
    (target / "config.json").write_text(json.dumps(fields))

    loaded = FluxTransformer2DModel.from_pretrained(target, quantization_config=LowbitConfig())
    assert_same_weights(quantized, loaded)
    plain = FluxTransformer2DModel.from_pretrained(target, quantization_config=LowbitConfig(dequantize=True))
    assert list(quantized_layers(plain)) == []
    assert not plain.is_quantized
    with pytest.raises(PlanError, match="is quantized already"):
        load(target, "int8")


@pytest.mark.filterwarnings(TWO_CONFIGS)
def test_the_config_of_a_folder_wins(folder, tmp_path):
    """diffusers takes the config of a quantized folder and warns about the one that it is given."""
    quantized = load(folder, "awq_w4a16")

    assert_same_weights(quantized, load(saved(quantized, tmp_path), "int8"))


def test_configs_that_cannot_be_followed_are_refused(folder):
    """Nothing to do, an unknown format, and one that needs calibration are said before anything is loaded."""
    with pytest.raises(PlanError, match="names no format"):
        load(folder, quantization_config=LowbitConfig())
    with pytest.raises(FormatError, match="awq_w4a17"):
        LowbitConfig("awq_w4a17")
    with pytest.raises(PlanError, match="calibration"):
        load(folder, "fp8_e4m3(input_scale=true)")
    with pytest.raises(PlanError, match="no layer of the model is to be quantized"):
        load(folder, quantization_config=LowbitConfig("int8", layers={".": "keep"}))


def test_weights_that_are_not_finite_are_refused(folder, tmp_path):
    """A NaN among the weights is an error that names the layer."""
    model = load(folder)
    with torch.no_grad():
        model.single_transformer_blocks[0].proj_mlp.weight[3, 5] = float("nan")

    with pytest.raises(WeightError, match=r"single_transformer_blocks\.0\.proj_mlp"):
        load(saved(model, tmp_path), "int8")


def test_pickles_are_not_written(folder, tmp_path):
    """Quantized weights are saved as safetensors, never as a pickle."""
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder, "int8").save_pretrained(tmp_path, safe_serialization=False)


def test_registration_is_guarded(monkeypatch):
    """Registering twice is the same as once, and a name that is taken is not taken over."""
    register()
    monkeypatch.setitem(registration.AUTO_QUANTIZER_MAPPING, "lowbit", type("Other", (), {}))

    with pytest.raises(DependencyError, match="knows a quantization method 'lowbit' already"):
        register()
