"""convrot_w4a4, int4_tensorwise and asym_w4a8_int8 in comfy files, with comfy-kitchen's layouts as the other side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.checkpoint.dialects import StoredLayer
from lowbit.errors import CheckpointError, FormatError, LowbitError, PartsError
from lowbit.formats import Parts, parse_spec
from tests.checkpoint.dialects.comfy_files import (
    COMFY,
    LAYER,
    assert_same_bits,
    find_one,
    load,
    make_parts,
    marker,
    marker_fields,
    stored,
)
from tests.support import gaussian, sqnr

SHAPE = (48, 512)
F32 = torch.float32
CONVROT = ["convrot_w4a4", "convrot_w4a4(rotation=64)", "convrot_w4a4(rotation=16,linear_dtype=int8)"]
W4A8 = [
    "w4a8_codebook",
    "w4a8_codebook(bits=6,codebook=False)",
    "w4a8_codebook(group_size=32,rotation=64,codebook=False)",
    "w4a8_codebook(rotation=16,codebook=False,correction=True)",
    "w4a8_codebook(correction=True)",
]


def described(spec: str, fields: dict, **changes: Tensor) -> dict[str, Tensor]:
    """A stored layer with another marker and, by the ends of their keys, other tensors."""
    return {
        **stored(spec, SHAPE),
        f"{LAYER}.comfy_quant": marker(fields),
        **{f"{LAYER}.{end}": tensor for end, tensor in changes.items()},
    }


def kitchen_tensor(tensors: dict[str, Tensor]):
    """kitchen's tensor over stored ones, made as ComfyUI's loader makes it from marker and keys."""
    made = pytest.importorskip("comfy_kitchen.tensor")
    fields = marker_fields(tensors)
    side = {key.removeprefix(f"{LAYER}.weight_"): tensor for key, tensor in tensors.items() if "weight_" in key}
    common = {"orig_dtype": F32, "orig_shape": SHAPE, "convrot_groupsize": fields["convrot_groupsize"]}
    if fields["format"] == "convrot_w4a4":
        layout = made.TensorCoreConvRotW4A4Layout
        params = layout.Params(scale=side["scale"], linear_dtype=fields.get("linear_dtype", "int4"), **common)
    else:
        layout = made.AsymW4A8Int8Layout
        params = layout.Params(scale=side.pop("s_rel"), group_size=fields["group_size"], **side, **common)
    return made.QuantizedTensor(tensors[f"{LAYER}.weight"], layout.__name__, params)


@pytest.mark.parametrize("spec", CONVROT + W4A8)
def test_kitchen_reads_what_we_write(spec):
    """kitchen's layout class takes our tensors and decodes the same values, turned back up to the order of sums."""
    tensors = stored(spec, SHAPE, dtype=F32)
    layer, parts = load(tensors)

    theirs = kitchen_tensor(tensors)

    assert layer.format == parse_spec(spec)
    wanted = layer.format.dequantize(parts, SHAPE, F32)
    torch.testing.assert_close(theirs.dequantize(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [CONVROT[1], *W4A8])
def test_kitchen_multiplies_with_what_we_write(spec):
    """A linear through kitchen's tensor gives our linear in float32, but where a rounding of the input ties."""
    tensors, x = stored(spec, SHAPE, dtype=F32), gaussian(16, SHAPE[1], seed=3)
    layer, parts = load(tensors)

    with torch.inference_mode():
        theirs = F.linear(x, kitchen_tensor(tensors))

    same = torch.isclose(theirs, layer.format.linear(x, parts, None), rtol=1e-4, atol=1e-3).all(dim=1)
    assert same.sum() >= 15


@pytest.mark.parametrize(
    ("layout", "options", "fields", "spec"),
    [
        ("TensorCoreConvRotW4A4Layout", {}, {"format": "convrot_w4a4"}, "convrot_w4a4"),
        (
            "TensorCoreConvRotW4A4Layout",
            {"convrot_groupsize": 16, "linear_dtype": "int8"},
            {"format": "convrot_w4a4", "convrot_groupsize": 16, "linear_dtype": "int8"},
            "convrot_w4a4(rotation=16,linear_dtype=int8)",
        ),
        ("AsymW4A8Int8Layout", {}, {"format": "asym_w4a8_int8"}, "w4a8_codebook"),
        ("AsymW4A8Int8Layout", {"bits": 6}, {"format": "asym_w4a8_int8"}, "w4a8_codebook(bits=6,codebook=False)"),
        (
            "AsymW4A8Int8Layout",
            {"symmetric": False, "group_size": 32, "convrot_groupsize": 64},
            {"format": "asym_w4a8_int8", "group_size": 32, "convrot_groupsize": 64},
            "w4a8_codebook(group_size=32,rotation=64,codebook=False,correction=True)",
        ),
        (
            "AsymW4A8Int8Layout",
            {"codebook": False, "scale_dtype": F32},
            {"format": "asym_w4a8_int8", "params": {"group_size": 16, "convrot_groupsize": 256}},
            "w4a8_codebook(codebook=False)",
        ),
    ],
)
def test_state_dict_of_kitchen_comes_back_to_the_bit(layout, options, fields, spec):
    """What kitchen quantizes and ComfyUI saves is read, decodes to the same, and is written again bit for bit."""
    made = pytest.importorskip("comfy_kitchen.tensor")
    quantized = made.QuantizedTensor.from_float(gaussian(*SHAPE), layout, **options)
    saved = quantized.state_dict(f"{LAYER}.weight")
    tensors = {**saved, f"{LAYER}.comfy_quant": marker(fields)}

    layer, parts = load(tensors)
    again = COMFY.store_parts(layer, parts)

    assert layer.format == parse_spec(spec)
    assert layer.notes == []
    torch.testing.assert_close(layer.format.dequantize(parts, SHAPE, F32), quantized.dequantize(), rtol=1e-5, atol=1e-6)
    assert set(again) == set(tensors)
    for key, tensor in saved.items():
        assert_same_bits(again[key], tensor)
    assert marker_fields(again).items() >= {name: v for name, v in fields.items() if name != "params"}.items()
    assert load(again)[0].format == layer.format


@pytest.mark.parametrize(
    ("spec", "fields", "shapes"),
    [
        ("convrot_w4a4", {"format": "convrot_w4a4", "convrot_groupsize": 256}, {"weight_scale": (48,)}),
        (
            "convrot_w4a4(linear_dtype=int8)",
            {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int8"},
            {"weight_scale": (48,)},
        ),
        ("convrot_w4a4(rotation=0)", {"format": "int4_tensorwise", "convrot": False}, {"weight_scale": (48, 1)}),
        (
            "w4a8_codebook",
            {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
            {"weight": (48, 256), "weight_s_rel": (48, 32), "weight_s_channel": (48,), "weight_codebook": (16,)},
        ),
        (
            "w4a8_codebook(bits=6,group_size=32,codebook=false)",
            {"format": "asym_w4a8_int8", "group_size": 32, "convrot_groupsize": 256},
            {"weight": (48, 384), "weight_s_rel": (48, 16), "weight_s_channel": (48,)},
        ),
    ],
)
def test_what_is_written(spec, fields, shapes):
    """Names, fields, keys and shapes are ComfyUI's; nothing of ours is needed to read them."""
    tensors = stored(spec, SHAPE)

    assert marker_fields(tensors) == {**fields, "orig_dtype": "torch.bfloat16"}
    for end, shape in shapes.items():
        assert tensors[f"{LAYER}.{end}"].shape == shape
    assert len(tensors) == len({"weight", *shapes}) + 1
    assert tensors[f"{LAYER}.weight"].dtype == torch.int8


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("convrot_w4a4(rotation=0)", {"format": "int4_tensorwise"}),
        ("convrot_w4a4(rotation=0)", {"format": "int4_tensorwise", "per_row": True, "convrot": False}),
        ("convrot_w4a4", {"format": "int4_tensorwise", "convrot": True}),
        ("convrot_w4a4(rotation=64)", {"format": "int4_tensorwise", "convrot": True, "convrot_groupsize": 64}),
        ("convrot_w4a4", {"format": "convrot_w4a4", "quant_group_size": 64}),
        ("convrot_w4a4(rotation=64)", {"format": "convrot_w4a4", "params": {"convrot_groupsize": 64}}),
    ],
)
@pytest.mark.parametrize("columns", [1, 2], ids=["scale [N]", "scale [N, 1]"])
def test_one_layout_under_two_names(spec, fields, columns):
    """Either name is read with either shape of the scale, and the fields tell the rotation."""
    tensors = described(spec, fields)
    scale = tensors[f"{LAYER}.weight_scale"].reshape(-1)
    tensors[f"{LAYER}.weight_scale"] = scale if columns == 1 else scale.unsqueeze(1)

    layer, parts = load(tensors)

    assert layer.format == parse_spec(spec)
    assert layer.notes == []
    assert layer.options == {}
    assert_same_bits(parts["scale"], scale)


def test_a_rotation_without_its_flag_is_noted():
    """int4_tensorwise with a size of rotated groups but no flag is taken as rotated, and the note says so."""
    layer = find_one(described("convrot_w4a4(rotation=64)", {"format": "int4_tensorwise", "convrot_groupsize": 64}))

    assert layer.format == parse_spec("convrot_w4a4(rotation=64)")
    assert layer.notes == ["convrot is absent, but convrot_groupsize is 64: taken as rotated"]


def test_a_rotated_int4_tensorwise_becomes_what_stock_comfyui_reads():
    """int4_tensorwise with a rotation is written again as convrot_w4a4, with the same codes and scales."""
    fields = {"format": "int4_tensorwise", "convrot": True, "convrot_groupsize": 256}
    layer, parts = load(described("convrot_w4a4", fields))
    again = COMFY.store_parts(layer, parts)

    assert marker_fields(again)["format"] == "convrot_w4a4"
    assert_same_bits(again[f"{LAYER}.weight_scale"], parts["scale"])


def test_bytes_under_other_dtypes():
    """Codes and group scales that a program stored as uint8 are the same bytes."""
    tensors, parts = stored("w4a8_codebook", SHAPE), make_parts(parse_spec("w4a8_codebook"), SHAPE)
    for end in ("weight", "weight_s_rel"):
        tensors[f"{LAYER}.{end}"] = tensors[f"{LAYER}.{end}"].view(torch.uint8)

    for name, part in load(tensors)[1].items():
        assert_same_bits(part, parts[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_correction_is_never_lost(dtype):
    """A correction in any dtype comes back, and the decoded weight would be far off without it."""
    fmt = parse_spec("w4a8_codebook(codebook=false,correction=true)")
    parts: Parts = fmt.quantize((gaussian(*SHAPE) + 0.5).to(dtype))
    layer, back = load(COMFY.store_parts(StoredLayer(LAYER, fmt, SHAPE, torch.bfloat16), parts))

    assert_same_bits(back["correction"], parts["correction"])
    whole = layer.format.dequantize(back, SHAPE, F32)
    without = fmt.dequantize({**back, "correction": torch.zeros_like(back["correction"])}, SHAPE, F32)
    assert sqnr(whole, without) < 10


DEFECTS = {
    "awq variant": (("convrot_w4a4", {"format": "int4_tensorwise", "convrot": True, "awq": True}), "variant"),
    "padded": (("convrot_w4a4", {"format": "int4_tensorwise", "in_features": 500}), "padded weights are not known"),
    "kernel group": (("convrot_w4a4", {"format": "convrot_w4a4", "quant_group_size": 32}), "expected 64"),
    "linear dtype": (("convrot_w4a4", {"format": "convrot_w4a4", "linear_dtype": "fp8"}), "expected one of int4"),
    "group size": (("convrot_w4a4", {"format": "convrot_w4a4", "convrot_groupsize": 32}), "expected one of 0, 16"),
    "no rotation": (("convrot_w4a4", {"format": "convrot_w4a4", "convrot": False}), "convrot is false"),
    "w4a8 no rotation": (("w4a8_codebook", {"format": "asym_w4a8_int8", "convrot": False}), "convrot is false"),
    "w4a8 group size": (("w4a8_codebook", {"format": "asym_w4a8_int8", "group_size": 32}), "bytes a row, expected 512"),
    "tensor-wide": (("convrot_w4a4", {"format": "convrot_w4a4"}, torch.ones(())), r"expected \[48\]"),
}


@pytest.mark.parametrize(("change", "message"), DEFECTS.values(), ids=DEFECTS)
def test_defects_are_named(change, message):
    """What cannot be read for certain is one error that names file, layer and what was expected."""
    spec, fields, *scale = change
    with pytest.raises(LowbitError, match=f"model.safetensors: layer '{LAYER}': .*{message}") as caught:
        find_one(described(spec, fields, **({"weight_scale": scale[0]} if scale else {})))
    assert isinstance(caught.value, (CheckpointError, FormatError, PartsError))


@pytest.mark.parametrize("end", ["weight_s_rel", "weight_s_channel"])
def test_missing_scales_are_named(end):
    """A w4a8 layer without one of its scales is refused by name."""
    tensors = stored("w4a8_codebook", SHAPE)
    del tensors[f"{LAYER}.{end}"]
    with pytest.raises(PartsError, match=rf"layer '{LAYER}': .*{end.removeprefix('weight_')}.* is missing"):
        find_one(tensors)


def test_a_six_bit_weight_has_no_codebook():
    """A codebook beside a six-bit weight contradicts the format."""
    tensors = stored("w4a8_codebook(bits=6,codebook=false)", SHAPE)
    with pytest.raises(FormatError, match="bits=6 goes with codebook=false"):
        find_one({**tensors, f"{LAYER}.weight_codebook": torch.zeros(16)})
