"""Older ComfyUI files and files of other conventions become state dicts with a marker beside each quantized layer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint.dialects.comfy_marker import HEADER, MARKER, header_entry
from lowbit.errors import CheckpointError
from lowbit.formats import parse_spec
from lowbit.integrations.comfyui import describe_layers, read_file

PREFIX = "model.diffusion_model."


def _fields(made, layer):
    return json.loads(made.state_dict[f"{layer}.{MARKER}"].numpy().tobytes())


def _legacy(layer=f"{PREFIX}lin", *, marker=(2,), scale_input=1.0):
    weight = torch.randn(16, 32).to(torch.float8_e4m3fn)
    return {
        f"{layer}.weight": weight,
        f"{layer}.scale_weight": torch.tensor(0.5),
        f"{layer}.scale_input": torch.tensor(scale_input),
        f"{PREFIX}scaled_fp8": torch.zeros(marker, dtype=torch.float8_e4m3fn),
        f"{PREFIX}norm.weight": torch.ones(4).bfloat16(),
        f"{PREFIX}norm.scale_weight": torch.tensor(1.0),
    }


@pytest.mark.parametrize(("marker", "full"), [((2,), True), ((0,), False)])
def test_a_scaled_fp8_file_gets_markers_and_todays_names(marker, full):
    """The file's marker and dummy scales go, scales are renamed, two elements ask for full precision."""
    state = _legacy(marker=marker)
    made = describe_layers(state, None)

    assert set(made.state_dict) == {
        f"{PREFIX}lin.weight",
        f"{PREFIX}lin.weight_scale",
        f"{PREFIX}lin.comfy_quant",
        f"{PREFIX}norm.weight",
    }
    assert _fields(made, f"{PREFIX}lin").get("full_precision_matrix_mult", False) == full
    assert f"{PREFIX}scaled_fp8" in state


def test_an_input_scale_that_means_something_stays():
    """Only an input scale of exactly 1 is none."""
    made = describe_layers(_legacy(scale_input=0.25), None)

    assert float(made.state_dict[f"{PREFIX}lin.input_scale"]) == 0.25


def test_a_legacy_e5m2_layer_is_called_what_it_is():
    """The format is that of the codes, not the one ComfyUI writes for all such files."""
    state = _legacy()
    state[f"{PREFIX}lin.weight"] = state[f"{PREFIX}lin.weight"].float().to(torch.float8_e5m2)

    assert _fields(describe_layers(state, None), f"{PREFIX}lin")["format"] == "float8_e5m2"


def test_the_header_describes_layers_by_their_full_keys():
    """Entries of the header become markers; where both are, the header's fields win and the marker's others stay."""
    state = {f"{PREFIX}a.weight": torch.zeros(4, 4, dtype=torch.int8), f"{PREFIX}a.weight_scale": torch.ones(4, 1)}
    state[f"{PREFIX}a.{MARKER}"] = torch.tensor(list(b'{"format": "x", "per_row": true}'), dtype=torch.uint8)
    header = {**header_entry({f"{PREFIX}a": {"format": "x", "convrot": False}}), "author": "me"}
    made = describe_layers(state, header)

    assert _fields(made, f"{PREFIX}a") == {"format": "x", "per_row": True, "convrot": False}
    assert made.metadata == {"author": "me"}
    assert made.quantized == 1


@pytest.mark.parametrize(("in_header", "in_keys"), [("", PREFIX), (PREFIX, ""), (PREFIX, PREFIX), ("", "")])
def test_a_header_with_another_prefix_than_the_keys_is_understood(in_header, in_keys):
    """One prefix, too much or too little, that fits all described layers is put right, with a note."""
    state = {f"{in_keys}{name}.weight": torch.zeros(4, 4) for name in ("a.lin", "b.lin", "c.lin")}
    header = header_entry({f"{in_header}{name}.lin": {"format": "float8_e4m3fn"} for name in "ab"})
    made = describe_layers(state, header)

    marked = {key for key in made.state_dict if key.endswith(MARKER)}
    assert marked == {f"{in_keys}{name}.lin.comfy_quant" for name in "ab"}
    assert bool(made.notes) == (in_header != in_keys)


@pytest.mark.parametrize("names", [("a",), ("x.a",), ("x.lin", "y.other")])
def test_a_described_layer_that_is_not_there_is_an_error(names):
    """No prefix, or more than one, leads to layers of the file: nothing is guessed."""
    state = {f"{name}.weight": torch.zeros(4, 4) for name in ("x.lin", "y.a", "z.a")}
    header = header_entry({name: {"format": "awq_w4a16"} for name in names})
    with pytest.raises(CheckpointError, match=r"f\.safetensors: describes a quantized layer '(a|x\.a|y\.other)'"):
        describe_layers(state, header, "f.safetensors")


def test_a_header_that_cannot_be_read_is_an_error():
    """A damaged description is not passed over: the codes would be taken for weights."""
    with pytest.raises(CheckpointError, match=HEADER):
        describe_layers({"a.weight": torch.zeros(2, 2)}, {HEADER: "{"})


def test_a_plain_file_stays_as_it_is(tmp_path):
    """Without quantized layers nothing is added."""
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors", {"x": "y"})
    made = read_file(tmp_path / "a.safetensors")

    assert made.quantized == 0
    assert set(made.state_dict) == {"a.weight"}
    assert made.metadata == {"x": "y"}


def test_another_convention_is_put_into_comfyuis(tmp_path):
    """A BFL nvfp4 file (no description, other nibbles, scales in rows) has the same values under ComfyUI's names."""
    fmt = parse_spec("nvfp4")
    parts = fmt.quantize(torch.randn(32, 64).bfloat16())
    file = tmp_path / "flux.safetensors"
    tensors = {
        "lin.weight": parts["qdata"],
        "lin.weight_scale": parts["scale"],
        "lin.weight_scale_2": parts["global_scale"],
        "lin.bias": torch.ones(32),
    }
    save_file(tensors, file)
    made = read_file(file, "bfl")

    assert _fields(made, "lin")["format"] == "nvfp4"
    assert set(made.state_dict) == {*tensors, "lin.comfy_quant"}
    assert not torch.equal(made.state_dict["lin.weight"], parts["qdata"].view(torch.uint8))  # nibbles the other way
    with pytest.raises(CheckpointError, match="bfl_swapped"):
        read_file(file)


def test_a_folder_with_several_models_is_not_guessed_at(tmp_path):
    """A pipeline folder holds several models; the message names them."""
    for name in ("transformer", "text_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        file = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / name / f"{file}.safetensors")
    loaders = {"transformer": ["diffusers", "X"], "text_encoder": ["transformers", "Y"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **loaders}))
    with pytest.raises(CheckpointError, match=r"several models \(text_encoder, transformer\)"):
        read_file(tmp_path)
