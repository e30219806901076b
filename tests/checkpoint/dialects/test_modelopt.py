"""The ModelOpt dialect, and the unmarked files of Black Forest Labs that look the same."""

from __future__ import annotations

import pytest
import torch

from lowbit.checkpoint.dialects import Container, StoredLayer, TensorSpec, detect_dialect, get_dialect
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import parse_spec
from lowbit.numerics.packing import swap_nibbles
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.support import gaussian

DIALECT = get_dialect("modelopt")
LAYER = "model.layers.0.mlp.up_proj"
SPECS = ("nvfp4", "nvfp4(input_scale=true)", "fp8_e4m3(input_scale=true)")


def layer_and_parts(spec: str, shape=(32, 64), name: str = LAYER):
    """A layer to write, and the parts of a Gaussian weight."""
    fmt = parse_spec(spec)
    parts = fmt.plain.quantize(gaussian(*shape, dtype=torch.bfloat16))
    if fmt.input_scale:
        parts["input_scale"] = torch.tensor(0.25)
    return StoredLayer(name, fmt, shape), parts


def container(tensors, configs) -> Container:
    """A folder with these tensors and JSON files."""
    return Container({k: TensorSpec.of(t) for k, t in tensors.items()}, configs=configs, where="folder")


def written(*specs: str):
    """The tensors and JSON files of a folder with one layer a spec."""
    layers, tensors = [], {}
    for index, spec in enumerate(specs):
        layer, parts = layer_and_parts(spec, name=f"{LAYER}{index}")
        layers.append(layer)
        tensors |= DIALECT.store_parts(layer, parts)
    return tensors, DIALECT.config_fields(layers, {})


def find(tensors, configs, name="modelopt"):
    """The layers of a folder."""
    return get_dialect(name).find_layers(container(tensors, configs), tensors.__getitem__)


@pytest.mark.parametrize("spec", SPECS)
def test_every_format_comes_back_bit_for_bit(spec):
    """Parts are written as they are, described by either file alone, and read back with the same bits."""
    stored, parts = layer_and_parts(spec)
    tensors = DIALECT.store_parts(stored, parts)
    assert {key: TensorSpec.of(tensor) for key, tensor in tensors.items()} == DIALECT.stored_specs(stored)
    both = DIALECT.config_fields([stored], {})
    for configs in (both, *({name: content} for name, content in both.items())):
        held = container(tensors, configs)
        assert detect_dialect(held) is DIALECT
        (layer,) = find(tensors, configs).layers.values()
        assert (layer.format, layer.shape) == (stored.format, stored.shape)
        for name, part in DIALECT.load_parts(layer, tensors.__getitem__).items():
            assert_same_bits(part, parts[name])


def test_codes_and_scales_are_where_others_look_for_them():
    """The even column is in the low nibble, block scales lie in rows, and the global scale is amax / 2688."""
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 16] = 6.0, 1.0, 3.0
    fmt = parse_spec("nvfp4")
    tensors = DIALECT.store_parts(StoredLayer("a", fmt, (1, 32)), fmt.quantize(w))
    assert tensors["a.weight"][0, 0].item() == 0x27  # 1.0 in the high nibble, 6.0 in the low one
    assert tensors["a.weight_scale"].float().tolist() == [[448.0, 224.0]]
    assert tensors["a.weight_scale_2"].item() == pytest.approx(6 / 2688)


def test_layers_of_several_algorithms_are_named():
    """A mixed model says for each layer what it is."""
    tensors, configs = written(*SPECS)
    facts = configs["config.json"]["quantization_config"]
    assert facts["quant_algo"] == "MIXED_PRECISION"
    kinds = {name: entry["quant_algo"] for name, entry in facts["quantized_layers"].items()}
    assert kinds == {f"{LAYER}0": "W4A16_NVFP4", f"{LAYER}1": "NVFP4", f"{LAYER}2": "FP8"}
    found = find(tensors, configs)
    assert [layer.format.spec for layer in found.layers.values()] == [parse_spec(spec).spec for spec in SPECS]
    assert any("no input_scale" in note for note in found.layers[f"{LAYER}0"].notes)


@pytest.mark.parametrize("spec", ["nvfp4(global_scale_divides=true)", "fp8_e4m3", "int8", "fp8_e4m3(granularity=row)"])
def test_what_it_cannot_say_is_refused(spec):
    """Formats that ModelOpt has no algorithm for are refused in words, before anything is written."""
    stored = StoredLayer(LAYER, parse_spec(spec), (32, 64))
    assert DIALECT.refuses(stored)
    with pytest.raises(PartsError, match=LAYER):
        DIALECT.stored_specs(stored)


def test_contradictions_are_errors():
    """Files that disagree, unknown algorithms and a wrong group size name the file and the remedy."""
    tensors, configs = written("nvfp4")
    own, config = configs["hf_quant_config.json"]["quantization"], configs["config.json"]["quantization_config"]
    for change, message in (
        ({"quant_algo": "FP8"}, "correct one of them"),
        ({"quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ' by ModelOpt, which lowbit does not read"),
        ({"group_size": 32}, "group size of nvfp4 is said to be 32"),
    ):
        wrong = {"config.json": {"quantization_config": config}}
        wrong["hf_quant_config.json"] = {"quantization": own | change}
        if change.get("quant_algo") == "W4A8_AWQ":
            del wrong["config.json"]
        with pytest.raises(CheckpointError, match=message):
            find(tensors, wrong)
    with pytest.raises(CheckpointError, match="holds nvfp4, and the configuration says FP8"):
        find(tensors, {"hf_quant_config.json": {"quantization": own | {"quant_algo": "FP8"}}})


@pytest.mark.parametrize("value", [2688.0, 0.0, float("nan"), float("inf"), []])
def test_a_divisor_in_place_of_a_factor_is_caught(value):
    """A global scale that no weight can have is an error that names both readings, or says that it was never set."""
    tensors, configs = written("nvfp4")
    tensors[f"{LAYER}0.weight_scale_2"] = torch.tensor(value)
    with pytest.raises(CheckpointError, match=r"compressed-tensors stores|never set"):
        find(tensors, configs)


def test_unmarked_files_are_read_only_by_name():
    """Without a description nothing is guessed; named, the two orders of nibbles decode to the same weight."""
    stored, parts = layer_and_parts("nvfp4")
    tensors = DIALECT.store_parts(stored, parts)
    with pytest.raises(CheckpointError, match="--source-dialect comfy, bfl, bfl_swapped"):
        detect_dialect(container(tensors, {}))
    swapped = {**tensors, f"{LAYER}.weight": swap_nibbles(tensors[f"{LAYER}.weight"])}
    for name, given in (("bfl", tensors), ("bfl_swapped", swapped)):
        (layer,) = find(given, {}, name).layers.values()
        assert_same_bits(get_dialect(name).load_parts(layer, given.__getitem__)["qdata"], parts["qdata"])
        with pytest.raises(PartsError, match="only read"):
            get_dialect(name).stored_specs(layer)


def test_rows_of_fp8_scales_are_read():
    """Black Forest Labs' fp8 has one scale a row, in a vector."""
    fmt = parse_spec("fp8_e4m3(granularity=row)")
    parts = fmt.quantize(gaussian(32, 64))
    tensors = {"a.weight": parts["qdata"], "a.weight_scale": parts["scale"].reshape(-1)}
    (layer,) = find(tensors, {}, "bfl").layers.values()
    assert layer.format == fmt
    assert_same_bits(get_dialect("bfl").load_parts(layer, tensors.__getitem__)["scale"], parts["scale"])
