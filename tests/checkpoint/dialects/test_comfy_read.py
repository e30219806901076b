"""What other programs write, and the freedom they take: spellings, nesting, shapes of scales, labels, absent fields."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from lowbit.checkpoint.dialects import Container, detect_dialect
from lowbit.errors import CheckpointError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import (
    COMFY,
    LAYER,
    assert_same_bits,
    find,
    find_one,
    load,
    make_parts,
    marker,
    marker_fields,
    specs_of,
    stored,
)

WEIGHT, SCALE, MARKER = f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.comfy_quant"


def described(spec: str, fields: dict, shape=(64, 128), **tensors):
    """A stored layer whose marker says `fields`, with tensors replaced by the ends of their keys."""
    named = {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}
    return {**stored(spec, shape), **named, MARKER: marker(fields)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "name"),
    [
        (stored("fp8_e4m3"), {}, "comfy"),
        ({"a.weight": torch.ones(2, 2)}, {"_quantization_metadata": '{"layers":{}}'}, "comfy"),
        ({"comfy_quant": marker({}), "weight": torch.ones(1, 1)}, {}, "comfy"),
        ({"scaled_fp8": torch.zeros(0), "a.weight": torch.ones(2, 2)}, {}, "comfy"),
        ({"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}, {"format": "pt"}, None),
        ({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {}, None),
    ],
)
def test_detection(tensors, metadata, name):
    """Markers, the header's entry and scaled_fp8 tell the dialect; a cast to float8 without scales is plain."""
    dialect = detect_dialect(Container(specs_of(tensors), metadata))
    assert (dialect and dialect.name) == name


@pytest.mark.parametrize(
    "tensors",
    [
        {
            "a.weight": torch.zeros(8, 8, dtype=torch.uint8),
            "a.weight_scale": torch.ones(8, 1),
            "a.weight_scale_2": torch.ones(()),
        },
        {"a.qweight": torch.zeros(8, 8, dtype=torch.int32), "a.scales": torch.ones(8)},
        {"a.weight_packed": torch.zeros(8, 8, dtype=torch.uint8)},
    ],
    ids=["bfl-or-modelopt-nvfp4", "gptq", "compressed-tensors"],
)
def test_conventions_without_a_marker_are_not_guessed(tensors):
    """Quantized weights that nothing describes are neither plain nor read as something."""
    with pytest.raises(CheckpointError, match=r"m\.safetensors: 'a\..*nothing says how.*--source-dialect"):
        detect_dialect(Container(specs_of(tensors), where="m.safetensors"))


def test_a_layer_without_its_marker_is_not_guessed():
    """Beside described layers, an nvfp4 layer without a marker (BFL's have other nibbles) is an error that names it."""
    bare = {key.replace(LAYER, "other"): tensor for key, tensor in stored("nvfp4").items() if "comfy" not in key}
    with pytest.raises(CheckpointError, match=r"layer 'other'.*no comfy_quant marker.*nibbles"):
        find({**stored("nvfp4"), **bare})


def test_fields_nested_under_params():
    """Fields under "params" count like those at the top, which win."""
    nested = {"format": "int8_tensorwise", "params": {"per_row": True, "convrot": True, "convrot_groupsize": 16}}
    layer = find_one(described("int8(rotation=16)", nested))
    assert layer.format == parse_spec("int8(rotation=16)")
    layer = find_one(described("int8(rotation=16)", {**nested, "convrot_groupsize": 64}))
    assert layer.format == parse_spec("int8(rotation=64)")
    assert layer.options == {}


def test_nested_group_size():
    """A group size under "params" is the layer's."""
    fields = {"format": "awq_w4a16", "params": {"group_size": 32}}
    assert find_one(described("awq_w4a16(group_size=32)", fields)).format == parse_spec("awq_w4a16(group_size=32)")


def test_absent_group_size_comes_from_the_scale():
    """Without a group size, awq_w4a16 takes it from the shape of the scale and says so."""
    layer = find_one(described("awq_w4a16(group_size=32)", {"format": "awq_w4a16"}))
    assert layer.format == parse_spec("awq_w4a16(group_size=32)")
    assert layer.notes == ["group_size is absent from the marker: 32 by the shape of the scale"]


def test_header_wins_over_marker():
    """The header's fields win; what only the marker says stays (convert_to_quant's header lacks per_row)."""
    tensors = stored("int8(rotation=16)", (1, 64))
    header = {"layers": {LAYER: {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}}}
    layer = find_one(tensors, {"_quantization_metadata": json.dumps(header)})
    assert layer.format == parse_spec("int8(rotation=64)")
    assert layer.notes == ["convrot_groupsize is 64 in the header, 16 in the marker: the header counts"]


def test_header_of_another_format_replaces_the_marker():
    """Where header and marker name different formats, nothing of the marker is mixed in."""
    tensors = described("fp8_e4m3", {"format": "nvfp4", "group_size": 16})
    layer = find_one(tensors, {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "float8_e4m3fn"}}})})
    assert layer.format == parse_spec("fp8_e4m3")
    assert layer.notes == ["the header says 'float8_e4m3fn', the marker 'nvfp4': the header counts"]


def test_header_without_layers():
    """A header without "layers", at which ComfyUI fails, leaves the markers in force and is noted."""
    found = find(stored("fp8_e4m3"), {"_quantization_metadata": '{"format_version": "1.0"}'})
    assert list(found.layers) == [LAYER]
    assert found.notes == ['the header\'s _quantization_metadata has no "layers": only marker tensors count']


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_in_any_shape(shape):
    """A single scale may have no axis or axes of length one, and 16 bits: it widens exactly."""
    scale = torch.full(shape, 0.5, dtype=torch.bfloat16)
    layer, parts = load(described("fp8_e4m3", {"format": "float8_e4m3fn"}, weight_scale=scale))
    assert layer.format == parse_spec("fp8_e4m3")
    assert_same_bits(parts["scale"], torch.tensor(0.5))


@pytest.mark.parametrize("shape", [(64,), (64, 1)])
@pytest.mark.parametrize(
    ("spec", "fields", "noted"),
    [
        ("fp8_e4m3(granularity=row)", {"format": "float8_e4m3fn_rowwise"}, False),
        ("fp8_e4m3(granularity=row)", {"format": "float8_e4m3fn_blockwise", "group_size": 128}, True),
        ("fp8_e4m3(granularity=row)", {"format": "float8_e4m3fn"}, True),
        ("int8", {"format": "int8_tensorwise", "per_row": True}, False),
        ("int8", {"format": "int8_tensorwise"}, False),
        ("int8", {"format": "int8_blockwise", "group_size": 1}, True),
    ],
)
def test_a_scale_a_row_whatever_the_label(spec, fields, noted, shape):
    """One scale a row is read as that, also where convert_to_quant labels it blockwise; a wrong label is noted."""
    layer, parts = load(described(spec, fields, weight_scale=torch.ones(shape)))
    assert layer.format == parse_spec(spec)
    assert parts["scale"].shape == (64, 1)
    assert any("labelled" in note for note in layer.notes) == noted


def test_blocks_that_convert_to_quant_labels_tensorwise():
    """Its all-zero int8 layers carry a scale a block of 128 under the label of another granularity: read, and noted."""
    fields = {"format": "int8_tensorwise", "per_row": True}
    layer, parts = load({**stored("int8(granularity=block)", (256, 256)), MARKER: marker(fields)})
    assert layer.format == parse_spec("int8(granularity=block)")
    assert parts["scale"].shape == (2, 2)
    assert any("labelled int8_tensorwise" in note for note in layer.notes)


@pytest.mark.parametrize(
    "fields", [{"format": "float8_e4m3fn_rowwise"}, {"format": "float8_e4m3fn_blockwise", "group_size": 48}]
)
def test_one_scale_whatever_the_label(fields):
    """One scale for a weight labelled otherwise is read as that and noted."""
    layer = find_one(described("fp8_e4m3", fields))
    assert layer.format == parse_spec("fp8_e4m3")
    assert len(layer.notes) == 1
    assert "labelled" in layer.notes[0]


@pytest.mark.parametrize(
    ("fields", "scale", "block"),
    [
        ({"group_size": 32}, (3, 4), (32, 32)),
        ({"block_size": 32}, (3, 4), (32, 32)),
        ({"block_size": [16, 128]}, (5, 1), (16, 128)),
        ({"params": {"group_size": 32}}, (3, 4), (32, 32)),
        ({"group_size": 128}, (1, 1), (128, 128)),
        ({"group_size": 128}, (), (128, 128)),
        ({}, (10, 16), (8, 8)),
    ],
)
@pytest.mark.parametrize("base", ["float8_e4m3fn", "int8"])
def test_blocks(base, fields, scale, block):
    """Blocks come from either field or from the shape of the scale; the last ones may be cut (80 = 2.5 x 32)."""
    spec = {"int8": "int8", "float8_e4m3fn": "fp8_e4m3"}[base]
    rows, columns = block
    whole = f"{spec}(granularity=block,block_size={rows}x{columns})"
    tensors = described(whole, {"format": f"{base}_blockwise", **fields}, (80, 128), weight_scale=torch.ones(scale))
    layer, parts = load(tensors)
    assert layer.format == parse_spec(whole)
    assert parts["scale"].shape == (-(-80 // rows), -(-128 // columns))


@pytest.mark.parametrize(
    ("key", "fields", "expected", "inferred"),
    [
        ("blocks.0.img_mlp.net.2", {}, True, True),
        ("blocks.0.txt_mlp.net.2", {}, True, True),
        ("blocks.0.img_mlp.net.2", {"act_unsigned": False}, False, False),
        ("blocks.0.img_mlp.net.2", {"act_unsigned": True}, True, False),
        ("blocks.0.img_mlp.net.0", {}, False, False),
        ("blocks.0.attn.to_q", {"act_unsigned": True}, True, False),
    ],
)
def test_act_unsigned(key, fields, expected, inferred, caplog):
    """The flag is taken as it stands; only where it is absent do the names of early Qwen-Image files decide, aloud."""
    tensors = {name.replace(LAYER, key): tensor for name, tensor in stored("svdquant_w4a4").items()}
    tensors[f"{key}.comfy_quant"] = marker({"format": "svdquant_w4a4", **fields})
    with caplog.at_level(logging.WARNING, logger="lowbit"):
        layer = find_one(tensors)
    assert layer.format == parse_spec(f"svdquant_w4a4(act_unsigned={expected})")
    assert any("inferred from the layer name" in note for note in layer.notes) == inferred
    assert [key in record.getMessage() for record in caplog.records] == [True] * inferred
    off = find_one(tensors, infer_act_unsigned=False)
    assert off.format == parse_spec(f"svdquant_w4a4(act_unsigned={expected and not inferred})")
    # Written again it is explicit, and a reader who switches inference off gets what was written.
    again = COMFY.store_parts(layer, make_parts(layer.format, layer.shape))
    assert marker_fields(again, key)["act_unsigned"] is expected
    back = find_one(again, infer_act_unsigned=False)
    assert (back.format, back.options) == (layer.format, {"act_unsigned_inferred": True} if inferred else {})


def test_low_rank_basis():
    """proj_down for x / smooth_factor is folded at reading, as its exporter would; the raw basis is taken as it is."""
    plain = {"format": "svdquant_w4a4", "act_unsigned": False}
    tensors = stored("svdquant_w4a4(rank=8)")
    raw_fields = {"lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
    layer, raw = load({**tensors, MARKER: marker({**plain, **raw_fields})})
    assert layer.options == raw_fields
    assert_same_bits(raw["proj_down"], tensors[f"{LAYER}.proj_down"])
    post = {"lowrank_branch_input_basis": "post_smoothing", "proj_down_smooth_folded": False}
    layer, parts = load({**tensors, MARKER: marker({**plain, **post})})
    assert layer.options == raw_fields  # what the loaded parts are
    smooth = tensors[f"{LAYER}.smooth_factor"].float()
    assert_same_bits(parts["proj_down"], (raw["proj_down"].float() / smooth[:, None]).bfloat16())


def test_optional_tensors():
    """input_scale and pre_quant_scale beside any layer become parts of its format."""
    extra = {"input_scale": torch.tensor([0.5]), "pre_quant_scale": torch.ones(128)}
    layer, parts = load(described("nvfp4", {"format": "nvfp4", "orig_shape": [64, 128]}, **extra))
    assert (layer.format.input_scale, layer.format.pre_quant_scale) == (True, True)
    assert_same_bits(parts["input_scale"], torch.tensor(0.5))


@pytest.mark.parametrize(
    ("text", "dtype"), [("torch.float16", torch.float16), ("float32", torch.float32), (None, torch.bfloat16)]
)
def test_logical_dtype(text, dtype):
    """orig_dtype is read with and without its prefix; without it the weight counts as bfloat16."""
    assert find_one(described("fp8_e4m3", {"format": "float8_e4m3fn", "orig_dtype": text})).dtype == dtype


def test_tile_packed_without_the_field():
    """Four axes tell the tile-packed arrangement where the marker forgets it."""
    tensors = stored("svdquant_w4a4", (128, 128), "kitchen_tile_packed_w4a4")
    fields = {name: value for name, value in marker_fields(tensors).items() if name != "layout"}
    layer = find_one({**tensors, MARKER: marker(fields)})
    assert (layer.layout, layer.shape) == ("kitchen_tile_packed_w4a4", (128, 128))
    assert any("names no layout" in note for note in layer.notes)
