"""What is written comes back: every registered format, its description and its options."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lowbit.checkpoint.dialects import StoredLayer, TensorSpec
from lowbit.errors import PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import (
    COMFY,
    LAYER,
    assert_same_bits,
    every_spec,
    find,
    find_one,
    load,
    make_parts,
    marker_fields,
    specs_of,
    stored,
)

SHAPES = [(40, 256), (128, 256), (16, 1024), (33, 40), (1, 64), (2, 33), (0, 64)]
CASES = [
    pytest.param(spec, shape, id=f"{spec}-{shape[0]}x{shape[1]}")
    for spec in every_spec()
    for shape in SHAPES
    if parse_spec(spec).check_shape(*shape) is None
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(("spec", "shape"), CASES)
def test_every_format_comes_back_bit_for_bit(spec, shape):
    """Storing and loading a layer gives the same format, shape, dtype and bits, from the marker alone."""
    fmt = parse_spec(spec)
    parts = make_parts(fmt, shape)
    tensors = COMFY.store_parts(StoredLayer(LAYER, fmt, shape), parts)
    layer, back = load(tensors)
    assert (layer.format, layer.shape, layer.dtype, layer.layout) == (fmt, shape, torch.bfloat16, "")
    assert set(layer.keys.values()) == set(tensors)
    assert list(back) == list(fmt.part_names)
    for name, part in parts.items():
        assert_same_bits(back[name], part)


@pytest.mark.parametrize(("spec", "shape"), CASES)
def test_specs_are_those_of_the_tensors(spec, shape):
    """What `stored_specs` promises before the data exists is what `store_parts` gives, key order included."""
    fmt = parse_spec(spec)
    for dtype in DTYPES:
        parts = make_parts(fmt, shape, dtype)
        layer = StoredLayer(LAYER, fmt, shape, dtype, options={"note": "x"})
        tensors = COMFY.store_parts(layer, parts)
        promised = COMFY.stored_specs(layer)
        dtypes = {name: part.dtype for name, part in parts.items()}
        given = COMFY.stored_specs(dataclasses.replace(layer, dtypes=dtypes))
        assert list(given.items()) == list(specs_of(tensors).items())
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        if not fmt.pre_quant_scale:  # make_parts chooses the dtype of that one
            assert promised == given


@pytest.mark.parametrize("spec", every_spec())
def test_header_alone_is_enough(spec):
    """A file whose markers are gone is read by its header, which says what the markers say."""
    fmt, shape = parse_spec(spec), (32, 1024)
    tensors = stored(spec, shape)
    metadata = COMFY.header_metadata([StoredLayer(LAYER, fmt, shape)], {})
    described = json.loads(metadata["_quantization_metadata"])
    assert described == {"format_version": "1.0", "layers": {LAYER: marker_fields(tensors)}}
    both = find_one(tensors, metadata)
    del tensors[f"{LAYER}.comfy_quant"]
    layer = find_one(tensors, metadata)
    assert (layer.format, layer.shape, layer.notes) == (fmt, shape, [])
    assert (both.format, both.shape, both.notes) == (fmt, shape, [])


@pytest.mark.parametrize("spec", [spec for spec in every_spec() if spec.startswith("svdquant")])
def test_tile_packed_comes_back(spec):
    """The tile-packed arrangement is written, recognised and undone."""
    fmt, shape, layout = parse_spec(spec), (256, 192), "kitchen_tile_packed_w4a4"
    parts = make_parts(fmt, shape)
    tensors = COMFY.store_parts(StoredLayer(LAYER, fmt, shape, layout=layout), parts)
    assert tensors[f"{LAYER}.weight"].shape == (2, 3, 32, 128)
    assert COMFY.stored_specs(StoredLayer(LAYER, fmt, shape, layout=layout)) == specs_of(tensors)
    layer, back = load(tensors)
    assert (layer.format, layer.shape, layer.layout) == (fmt, shape, layout)
    for name, part in parts.items():
        assert_same_bits(back[name], part)


def test_tiles_need_whole_tiles():
    """A weight that does not fit the tile-packed arrangement is refused by name, before the data exists."""
    fmt = parse_spec("svdquant_w4a4(rank=8)")
    with pytest.raises(PartsError, match=f"layer '{LAYER}': .*not a multiple of 128"):
        COMFY.stored_specs(StoredLayer(LAYER, fmt, (64, 128), layout="kitchen_tile_packed_w4a4"))


def test_mixed_part_dtypes_come_back():
    """Parts may have other dtypes than the weight had; the layer remembers them."""
    fmt = parse_spec("awq_w4a16")
    parts = make_parts(fmt, (16, 128), torch.float16)
    parts["zero"] = parts["zero"].float()
    tensors = COMFY.store_parts(StoredLayer(LAYER, fmt, (16, 128)), parts)
    layer, back = load(tensors)
    assert layer.dtypes == {"scale": torch.float16, "zero": torch.float32}
    assert COMFY.stored_specs(layer) == specs_of(tensors)
    assert_same_bits(back["zero"], parts["zero"])


def test_bare_layer():
    """A layer without a name has keys without a prefix."""
    fmt = parse_spec("fp8_e4m3")
    tensors = COMFY.store_parts(StoredLayer("", fmt, (8, 16), torch.float16), make_parts(fmt, (8, 16)))
    assert list(tensors) == ["weight", "weight_scale", "comfy_quant"]
    found = find(
        tensors | {"bias": torch.zeros(8)}, COMFY.header_metadata([StoredLayer("", fmt, (8, 16), torch.float16)], {})
    )
    assert found.layers[""].dtype == torch.float16
    assert found.plain == ["bias"]


def test_options_survive():
    """Flags of the runtime and fields nobody here knows are written again; false is what absence means."""
    tensors = stored("fp8_e4m3", full_precision_matrix_mult=True, some_tool={"version": 3})
    assert marker_fields(tensors)["full_precision_matrix_mult"] is True
    layer = find_one(tensors)
    assert layer.options == {"full_precision_matrix_mult": True, "some_tool": {"version": 3}}
    assert "full_precision_matrix_mult" not in marker_fields(stored("fp8_e4m3", full_precision_matrix_mult=False))
    assert find_one(stored("fp8_e4m3")).options == {}


def test_full_precision_turns_integer_activations_off():
    """For int8 the flag and `activations=none` are one thing; where they contradict, our own config is added."""
    tensors = stored("int8(activations=none)")
    assert marker_fields(tensors)["full_precision_matrix_mult"] is True
    assert "lowbit" not in marker_fields(tensors)
    assert find_one(tensors).format == parse_spec("int8(activations=none)")
    contradicting = stored("int8", full_precision_matrix_mult=True)
    assert marker_fields(contradicting)["lowbit"] == parse_spec("int8").config()
    assert find_one(contradicting).format == parse_spec("int8")


def test_own_config_only_where_needed():
    """The lowbit field stands only where the convention's own fields cannot say everything."""
    assert set(marker_fields(stored("fp8_e4m3"))) == {"format", "orig_dtype"}
    odd = stored("fp8_e4m3(block_size=64x64)")  # a field that means nothing with one scale for all
    assert marker_fields(odd)["lowbit"] == parse_spec("fp8_e4m3(block_size=64x64)").config()


def test_biases_and_other_keys_are_plain():
    """Everything that belongs to no layer is listed, in the file's order."""
    tensors = {"head.weight": torch.ones(4, 4), **stored("fp8_e4m3"), f"{LAYER}.bias": torch.ones(128)}
    found = find(tensors)
    assert found.plain == ["head.weight", f"{LAYER}.bias"]
    assert (found.container, found.problems, found.notes) == ([], [], [])


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp8"])
def test_caller_who_knows_the_shape_gets_it(spec):
    """Without orig_shape a padded layer is as large as its codes, unless the caller states the shape."""
    fmt, shape = parse_spec(spec), (33, 40)
    parts = make_parts(fmt, shape)
    tensors = COMFY.store_parts(StoredLayer(LAYER, fmt, shape), parts)
    fields = marker_fields(tensors)
    del fields["orig_shape"]
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    layer = find_one(tensors)
    assert layer.shape == {"nvfp4": (48, 48), "mxfp8": (64, 64)}[spec]
    assert any("orig_shape" in note for note in layer.notes)
    cut = COMFY.load_parts(dataclasses.replace(layer, shape=shape), tensors.__getitem__)
    for name, part in parts.items():
        assert_same_bits(cut[name], part)
    with pytest.raises(PartsError, match=r"model\.safetensors: layer 'blocks\.0\.attn\.to_q'.*expected"):
        COMFY.load_parts(dataclasses.replace(layer, shape=(33, 80)), tensors.__getitem__)


def test_wrong_parts_are_not_stored():
    """Parts that are not those of the format are refused before anything is written."""
    fmt = parse_spec("fp8_e4m3")
    parts = make_parts(fmt, (8, 16))
    with pytest.raises(PartsError, match=f"layer '{LAYER}': lacks scale"):
        COMFY.store_parts(StoredLayer(LAYER, fmt, (8, 16)), {"qdata": parts["qdata"]})


def test_sizes():
    """A spec knows its size, so offsets can be fixed before the data exists."""
    assert TensorSpec(torch.float32, ()).nbytes == 4
    assert TensorSpec(torch.float8_e4m3fn, (3, 5)).nbytes == 15
    assert str(TensorSpec(torch.uint8, (3,))) == "uint8 [3]"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("nvfp4", "nvfp4"),
        ("nvfp4(global_scale_divides=true)", "nvfp4_divided"),
        ("nvfp4(row_global_scale=true)", "nvfp4_by_row"),
    ],
)
def test_what_comfyui_would_misread_has_a_name_that_it_does_not_know(spec, name):
    """Only the global scale that ComfyUI multiplies by is stored under the name that it reads."""
    assert marker_fields(stored(spec))["format"] == name
