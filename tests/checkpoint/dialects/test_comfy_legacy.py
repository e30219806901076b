"""`scaled_fp8` files and INT8-Fast markers are read; migration rewrites descriptions and keys, never codes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lowbit.checkpoint.dialects import Container
from lowbit.checkpoint.dialects.comfy_migrate import Migration, migrate
from lowbit.errors import CheckpointError, LowbitError, PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import (
    COMFY,
    LAYER,
    WHERE,
    assert_same_bits,
    find,
    find_one,
    load,
    marker,
    marker_fields,
    specs_of,
    stored,
)

FP8 = torch.float8_e4m3fn


def legacy(elements: int = 0, prefix: str = "", dtype: torch.dtype = FP8, **tensors) -> dict[str, Tensor]:
    """A `scaled_fp8` file of one fp8 layer, with tensors added by the ends of their keys."""
    spec = {FP8: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}[dtype]
    current = stored(spec, (16, 32))
    layer = prefix + LAYER
    return {
        f"{prefix}scaled_fp8": torch.zeros(elements, dtype=dtype),
        f"{layer}.weight": current[f"{LAYER}.weight"],
        f"{layer}.scale_weight": current[f"{LAYER}.weight_scale"],
        f"{layer}.bias": torch.ones(16),
        **{f"{layer}.{name}": tensor for name, tensor in tensors.items()},
    }


def migrated(tensors: dict[str, Tensor], metadata: dict[str, str], to: str) -> tuple[Migration, dict[str, Tensor]]:
    """A migration and the tensors it gives, which must be those it promised, in that order."""
    migration = migrate(find(tensors, metadata), specs_of(tensors), metadata, to, WHERE)
    made = dict(migration.tensors(tensors.__getitem__))
    assert list(migration.specs.items()) == list(specs_of(made).items())
    return migration, made


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("elements", [0, 2])
def test_scaled_fp8_file(elements, prefix, dtype):
    """The codes' dtype tells the format; two elements in the file's marker ask for products in full precision."""
    tensors = legacy(elements, prefix, dtype)
    found = find(tensors)
    (layer,) = found.layers.values()
    assert layer.layer == prefix + LAYER
    assert layer.format == parse_spec("fp8_e4m3" if dtype == FP8 else "fp8_e5m2")
    assert layer.options == ({"full_precision_matrix_mult": True} if elements else {})
    assert layer.notes == []
    assert found.container == [f"{prefix}scaled_fp8"]
    assert found.plain == [f"{prefix}{LAYER}.bias"]
    parts = COMFY.load_parts(layer, tensors.__getitem__)
    assert_same_bits(parts["qdata"], tensors[f"{prefix}{LAYER}.weight"])
    assert_same_bits(parts["scale"], tensors[f"{prefix}{LAYER}.scale_weight"])


@pytest.mark.parametrize(("value", "kept"), [(1.0, False), (0.5, True)])
def test_scale_input(value, kept):
    """An input scale of exactly 1 means none; another one is kept. Neither is left over as a plain tensor."""
    found = find(legacy(scale_input=torch.tensor([value])))
    assert found.layers[LAYER].format.input_scale is kept
    assert found.plain == [f"{LAYER}.bias"]


def test_dummy_scales():
    """A scale of 1 beside a plain weight means nothing and is left out; another value would change the weight."""
    tensors = legacy()
    tensors |= {
        "out.weight": torch.ones(4, 4),
        "out.scale_weight": torch.tensor(1.0),
        "out.scale_input": torch.ones(()),
    }
    found = find(tensors)
    assert list(found.layers) == [LAYER]
    assert found.container == ["scaled_fp8", "out.scale_weight", "out.scale_input"]
    assert found.plain == [f"{LAYER}.bias", "out.weight"]
    with pytest.raises(CheckpointError, match=f"{WHERE}: layer 'out': .*scale_weight of 2.0"):
        find(tensors | {"out.scale_weight": torch.tensor(2.0)})


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1,), "fp8_e4m3"),
        ((16, 1), "fp8_e4m3(granularity=row)"),
        ((16,), "fp8_e4m3(granularity=row)"),
        ((4, 2), "fp8_e4m3(granularity=block,block_size=4x16)"),
        ((16, 4, 1), "fp8_e4m3(granularity=block,block_size=1x8)"),
    ],
)
def test_granularity_by_shape(shape, spec):
    """Files of other tools under these keys have scales a row or a block: the shape tells."""
    layer, parts = load({key: t for key, t in legacy(scale_weight=torch.ones(shape)).items() if "bias" not in key})
    assert layer.format == parse_spec(spec)
    layer.format.check(parts, layer.shape)


def test_without_the_file_marker():
    """A scale beside a float8 weight is enough, and the absent marker is noted."""
    tensors = legacy()
    del tensors["scaled_fp8"]
    assert COMFY.detect(Container(specs_of(tensors)))
    assert find_one(tensors).notes == ["has a scale_weight, but the file has no scaled_fp8 marker"]


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({"convrot": False, "per_row": True}, "int8"),
        ({"convrot": True, "convrot_groupsize": 16, "per_row": True}, "int8(rotation=16)"),
        ({"convrot": True, "per_row": True}, "int8(rotation=256)"),
    ],
)
def test_int8_fast_marker(fields, spec):
    """Markers of INT8-Fast name no format: int8 codes and its fields tell, and it is noted."""
    tensors = {**stored("int8"), f"{LAYER}.comfy_quant": marker(fields)}
    layer = find_one(tensors)
    assert layer.format == parse_spec(spec)
    assert layer.notes == ["the marker names no format (INT8-Fast): its fields and int8 codes say int8_tensorwise"]
    _, made = migrated(tensors, {}, "current")
    assert marker_fields(made)["format"] == "int8_tensorwise"


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"convrot": True, "convrot_groupsize": 256}, torch.ones(128, 1)),
        ({"convrot": False, "per_row": False}, torch.ones(128, 1)),
        ({"convrot": True, "per_row": True, "bits": 4}, torch.ones(128, 1)),
        ({"convrot": True, "per_row": True}, torch.ones(())),
        ({"convrot": True, "per_row": True}, torch.ones(128)),
        ({"convrot": True, "per_row": True}, None),
        ({"per_row": True}, torch.ones(1, 2)),
        ({}, torch.ones(128, 1)),
    ],
)
def test_other_markers_without_a_format_are_refused(fields, scale):
    """Without a format, only INT8-Fast's very fields with a scale [N, 1] are understood; nothing else is guessed."""
    tensors = {**stored("int8"), f"{LAYER}.comfy_quant": marker(fields), f"{LAYER}.weight_scale": scale}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"layer '{LAYER}': the marker names no format"):
        find_one(tensors)


@pytest.mark.parametrize("header", [False, True])
def test_hybrid_mxfp8_is_mxfp8(header):
    """hybrid_mxfp8 files decode by the scales of their blocks; the scale of the tensor goes, and that is noted."""
    plain = stored("mxfp8", (40, 128))
    fields = {**marker_fields(plain), "format": "hybrid_mxfp8"}
    described = {"format_version": "1.0", "layers": {LAYER: fields}}
    metadata = {"_quantization_metadata": json.dumps(described)} if header else {}
    tensors = {**plain, f"{LAYER}.comfy_quant": marker(fields), f"{LAYER}.weight_scalar": torch.tensor(0.01)}
    layer, parts = load(tensors, metadata)
    assert layer.format == parse_spec("mxfp8")
    assert any("weight_scalar" in note for note in layer.notes)
    for name, part in load(plain)[1].items():
        assert_same_bits(parts[name], part)
    migration, made = migrated(tensors, metadata, "current")
    assert made.keys() == plain.keys()
    assert marker_fields(made)["format"] == "mxfp8"
    assert "hybrid" not in str(migration.metadata)


def test_the_scale_of_hybrid_files_is_no_part_of_mxfp8():
    """A plain mxfp8 layer with a weight_scalar is refused as before: nothing says what it means."""
    with pytest.raises(PartsError, match="weight_scalar"):
        find_one({**stored("mxfp8", (40, 128)), f"{LAYER}.weight_scalar": torch.tensor(0.01)})


@pytest.mark.parametrize("elements", [0, 2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_to_current_and_back(elements, prefix):
    """Legacy to current and back gives the same tensors; header and marker agree; other metadata stays."""
    tensors = legacy(elements, prefix, scale_input=torch.tensor(0.5))
    migration, current = migrated(tensors, {"author": "someone"}, "current")
    layer = prefix + LAYER
    assert list(current) == [
        f"{layer}.{end}" for end in ("weight", "weight_scale", "input_scale", "comfy_quant", "bias")
    ]
    assert set(migration.metadata) == {"author", "_quantization_metadata"}
    described = json.loads(migration.metadata["_quantization_metadata"])["layers"]
    assert described == {layer: marker_fields(current, layer)}
    assert described[layer].get("full_precision_matrix_mult", False) is bool(elements)
    back_migration, back = migrated(current, migration.metadata, "legacy")
    assert back_migration.metadata == {"author": "someone"}
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        assert_same_bits(back[key], tensor)


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp8", "int8(rotation=64)", "awq_w4a16", "svdquant_w4a4(rank=8)"])
def test_current_stays_what_it_is(spec):
    """Migrating a current file of ours to the current convention changes no bit."""
    tensors = {"x.weight": torch.ones(3), **stored(spec, (40, 128))}
    _, made = migrated(tensors, {}, "current")
    assert list(made) == list(tensors)
    for key, tensor in tensors.items():
        assert_same_bits(made[key], tensor)


def test_spellings_are_put_right():
    """Foreign spellings and dtypes come out in the current ones, the data untouched."""
    tensors = stored("awq_w4a16", (16, 128), dtype=torch.float16)
    tensors[f"{LAYER}.weight_zeros"] = tensors.pop(f"{LAYER}.weight_zero")
    tensors[f"{LAYER}.comfy_quant"] = marker({"format": "awq_w4a16", "params": {"group_size": 64}, "tool": "x"})
    migration, made = migrated(tensors, {}, "current")
    assert marker_fields(made) == {
        "format": "awq_w4a16",
        "group_size": 64,
        "orig_dtype": "torch.float16",
        "tool": "x",
    }
    assert_same_bits(made[f"{LAYER}.weight_zero"], tensors[f"{LAYER}.weight_zeros"])
    assert migration.notes == [f"{LAYER}: zero is spelled weight_zeros here"]


def both(first: dict[str, Tensor], second: dict[str, Tensor], name: str = "other") -> dict[str, Tensor]:
    """Two one-layer files in one."""
    return {**first, **{key.replace(LAYER, name): tensor for key, tensor in second.items()}}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (stored("nvfp4"), f"layer '{LAYER}': is nvfp4"),
        (stored("fp8_e4m3(granularity=row)"), "one scale a weight"),
        (stored("fp8_e4m3(pre_quant_scale=true)"), "pre_quant_scale"),
        (stored("fp8_e4m3", some_tool=1), "marker says some_tool"),
        (both(stored("fp8_e4m3"), stored("fp8_e5m2")), "differ in format"),
        (both(stored("fp8_e4m3"), stored("fp8_e4m3", full_precision_matrix_mult=True)), "full_precision"),
        (both(stored("fp8_e4m3"), stored("fp8_e4m3"), "model.diffusion_model.a"), "key prefix"),
        ({**stored("fp8_e4m3"), "scaled_fp8": torch.ones(1), f"{LAYER}.scale_weight": torch.ones(())}, "both"),
    ],
)
def test_what_legacy_cannot_hold(tensors, message):
    """Whatever a scaled_fp8 file has no place for is refused by name, before anything is written."""
    with pytest.raises(LowbitError, match=f"{WHERE}: .*{message}"):
        migrated(tensors, {}, "legacy")


@pytest.mark.parametrize("to", ["current", "legacy"])
def test_a_plain_file_is_passed_on(to):
    """Without a quantized layer nothing is added, whichever the convention."""
    migration, made = migrated({"a.weight": torch.ones(2, 2)}, {"author": "someone"}, to)
    assert list(made) == ["a.weight"]
    assert migration.metadata == {"author": "someone"}


def test_an_unknown_convention():
    """The error names those there are."""
    with pytest.raises(CheckpointError, match="known are current, legacy"):
        migrated(stored("fp8_e4m3"), {}, "older")


def test_two_spellings_of_one_tensor():
    """A layer with its scale under the old and the new key is not migrated: one of them would be lost."""
    with pytest.raises(PartsError, match=f"{WHERE}: .*both .*weight_scale' and .*scale_weight'"):
        migrated(legacy(weight_scale=torch.ones(3)), {}, "current")


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3(granularity=row)", "mxfp8", "nvfp4"])
def test_a_file_that_lost_every_description_is_read_where_comfy_is_named(spec):
    """ComfyUI's tensors alone, without markers or header: naming the dialect settles what shapes cannot tell."""
    described = stored(spec, (64, 64))
    bare = {key: tensor for key, tensor in described.items() if not key.endswith("comfy_quant")}
    layer = COMFY.find_layers(Container(specs_of(bare), where=WHERE), bare.__getitem__).layers[LAYER]

    assert (layer.format, layer.shape) == (parse_spec(spec), (64, 64))
    assert any(note.startswith("nothing says how it is stored; as the dialect was named") for note in layer.notes)
    for name, part in load(described)[1].items():
        assert_same_bits(COMFY.load_parts(layer, bare.__getitem__)[name], part)


@pytest.mark.parametrize("spec", ["int8", "awq_w4a16", "svdquant_w4a4(rank=4)", "convrot_w4a4(rotation=16)"])
def test_integers_without_a_description_stay_unknown(spec):
    """They may be the codes of a rotated weight, of groups of any size: also where comfy is named they are refused."""
    bare = {key: tensor for key, tensor in stored(spec, (64, 64)).items() if not key.endswith("comfy_quant")}

    with pytest.raises(CheckpointError, match="no comfy_quant marker and no entry in the header"):
        COMFY.find_layers(Container(specs_of(bare), where=WHERE), bare.__getitem__)


def test_a_marked_file_with_an_unmarked_layer_is_not_completed():
    """One description in a file says that there are descriptions: a layer without one is damage, and an error."""
    tensors = stored("nvfp4", (64, 64))
    other = {key.replace(LAYER, "other"): value for key, value in tensors.items() if not key.endswith("comfy_quant")}

    with pytest.raises(CheckpointError, match=r"'other\.weight' is uint8"):
        COMFY.find_layers(Container(specs_of(tensors | other), where=WHERE), (tensors | other).__getitem__)
