"""comfy-kitchen as an oracle: its layouts read what we store, and what its `state_dict` gives is read here."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.tensor import (
    QuantizedTensor,
    TensorCoreAWQW4A16Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorCoreSVDQuantW4A4Layout,
    TensorWiseINT8Layout,
)
from torch import Tensor

from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import (
    COMFY,
    LAYER,
    assert_same_bits,
    find_one,
    load,
    make_parts,
    marker,
    stored,
)
from tests.support import gaussian

SHAPES = [(128, 256), (33, 40), (16, 96)]
F32 = torch.float32  # kitchen decodes in the dtype of the result; in float32 it rounds as often as we do


def kitchen(layout: type, tensors: dict[str, Tensor], shape: tuple[int, int], **params) -> QuantizedTensor:
    """kitchen's tensor over stored tensors; `params` name them by the ends of their keys, or are plain values."""
    named = {name: tensors[f"{LAYER}.{v}"] if isinstance(v, str) else v for name, v in params.items()}
    made = layout.Params(orig_dtype=F32, orig_shape=shape, **named)
    return QuantizedTensor(tensors[f"{LAYER}.weight"], layout.__name__, made)


def ours(tensors: dict[str, Tensor]) -> Tensor:
    """What we read from stored tensors, in float32."""
    layer, parts = load(tensors)
    return layer.format.dequantize(parts, layer.shape, F32)


def cut(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """Without the padding that kitchen's `dequantize` leaves on."""
    return tensor[: shape[0], : shape[1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2"])
def test_kitchen_reads_our_fp8(spec, shape):
    """kitchen decodes our tensor-wide fp8 to the same values."""
    tensors = stored(spec, shape)
    assert_same_bits(kitchen(TensorCoreFP8Layout, tensors, shape, scale="weight_scale").dequantize(), ours(tensors))


@pytest.mark.parametrize("shape", [(128, 256), (33, 64), (16, 192)])
@pytest.mark.parametrize("spec", ["int8", "int8(granularity=tensor)"])
def test_kitchen_reads_our_int8(spec, shape):
    """kitchen decodes our int8, one scale a row or one for all, to the same values."""
    tensors = stored(spec, shape)
    assert_same_bits(kitchen(TensorWiseINT8Layout, tensors, shape, scale="weight_scale").dequantize(), ours(tensors))


@pytest.mark.parametrize("group", [16, 64, 256])
def test_kitchen_reads_our_rotated_int8(group):
    """kitchen reads the codes of our rotated int8 as we do; turning them back differs by the order of sums only."""
    shape = (24, 512)
    tensors = stored(f"int8(rotation={group})", shape)
    rotated = kitchen(TensorWiseINT8Layout, tensors, shape, scale="weight_scale")
    back = kitchen(TensorWiseINT8Layout, tensors, shape, scale="weight_scale", convrot=True, convrot_groupsize=group)
    layer, parts = load(tensors)
    assert layer.format.rotation == group
    assert_same_bits(rotated.dequantize(), parse_spec("int8").dequantize(parts, shape, F32))
    torch.testing.assert_close(back.dequantize(), ours(tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_kitchen_reads_our_nvfp4(shape):
    """kitchen decodes our nvfp4 (nibbles, padding, swizzle) to the same values."""
    tensors = stored("nvfp4", shape)
    theirs = kitchen(TensorCoreNVFP4Layout, tensors, shape, scale="weight_scale_2", block_scale="weight_scale")
    assert TensorCoreNVFP4Layout.get_storage_shape(shape) == tensors[f"{LAYER}.weight"].shape
    assert_same_bits(cut(theirs.dequantize(), shape), ours(tensors))


@pytest.mark.parametrize("shape", SHAPES)
def test_kitchen_reads_our_mxfp8(shape):
    """kitchen decodes our mxfp8 to the same values, its scales viewed as E8M0 as ComfyUI's loader does."""
    tensors = stored("mxfp8", shape)
    key = f"{LAYER}.weight_scale"
    assert tensors[key].dtype == torch.uint8
    viewed = tensors | {key: tensors[key].view(torch.float8_e8m0fnu)}
    theirs = kitchen(TensorCoreMXFP8Layout, viewed, shape, scale="weight_scale")
    assert TensorCoreMXFP8Layout.get_storage_shape(shape) == tensors[f"{LAYER}.weight"].shape
    assert_same_bits(cut(theirs.dequantize(), shape), ours(tensors))


@pytest.mark.parametrize("group", [64, 32])
def test_kitchen_reads_our_awq(group):
    """kitchen decodes our awq_w4a16 to the same values."""
    shape = (24, 256)
    tensors = stored(f"awq_w4a16(group_size={group})", shape, dtype=F32)
    theirs = kitchen(
        TensorCoreAWQW4A16Layout, tensors, shape, scale="weight_scale", zeros="weight_zero", group_size=group
    )
    assert_same_bits(theirs.dequantize(), ours(tensors))


@pytest.mark.parametrize("layout", ["", "kitchen_tile_packed_w4a4"])
def test_kitchen_reads_our_svdquant(layout):
    """kitchen's matrix product with our svdquant_w4a4, natural and tile-packed, is that of our effective weight."""
    shape = (256, 128)
    tensors = stored("svdquant_w4a4(rank=8)", shape, layout, dtype=F32)
    theirs = kitchen(
        TensorCoreSVDQuantW4A4Layout,
        tensors,
        shape,
        scale="weight_scale",
        proj_down="proj_down",
        proj_up="proj_up",
        smooth_factor="smooth_factor",
    )
    # kitchen multiplies by a quantized identity: one code of 7 a row, whose scale 1/7 is rounded.
    torch.testing.assert_close(theirs.dequantize(), ours(tensors), rtol=1e-5, atol=1e-5)


def from_state_dict(quantized: QuantizedTensor, fields: dict) -> dict[str, Tensor]:
    """A file as ComfyUI saves it: kitchen's keys and a marker."""
    return {**quantized.state_dict(f"{LAYER}.weight"), f"{LAYER}.comfy_quant": marker(fields)}


@pytest.mark.parametrize(
    ("layout", "options", "fields", "spec"),
    [
        ("TensorCoreFP8Layout", {}, {"format": "float8_e4m3fn"}, "fp8_e4m3"),
        ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}, {"format": "float8_e5m2"}, "fp8_e5m2"),
        ("TensorWiseINT8Layout", {}, {"format": "int8_tensorwise"}, "int8(granularity=tensor)"),
        ("TensorWiseINT8Layout", {"per_channel": True}, {"format": "int8_tensorwise"}, "int8"),
        ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}, "nvfp4"),
        ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}, "mxfp8"),
    ],
)
def test_state_dict_of_kitchen_is_read(layout, options, fields, spec):
    """What kitchen quantizes and saves is read as the same values."""
    quantized = QuantizedTensor.from_float(gaussian(64, 128), layout, **options)
    tensors = from_state_dict(quantized, fields)
    assert find_one(tensors).format == parse_spec(spec)
    assert_same_bits(ours(tensors), quantized.dequantize())


@pytest.mark.parametrize("group", [16, 64, 256])
def test_rotated_state_dict_of_kitchen_is_read(group):
    """kitchen's ConvRot weight is read as the values it decodes to, up to the order of sums."""
    options = {"per_channel": True, "convrot": True, "convrot_groupsize": group}
    quantized = QuantizedTensor.from_float(gaussian(32, 256), "TensorWiseINT8Layout", **options)
    fields = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    tensors = from_state_dict(quantized, fields)
    assert find_one(tensors).format == parse_spec(f"int8(rotation={group})")
    torch.testing.assert_close(ours(tensors), quantized.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["awq_w4a16(group_size=32)", "svdquant_w4a4(rank=8,act_unsigned=true)"])
def test_state_dict_of_kitchen_spells_its_own_way(spec):
    """kitchen saves weight_zeros and weight_proj_down and no group_size; both are read, and the spelling is noted."""
    fmt, shape = parse_spec(spec), (128, 128)
    parts = make_parts(fmt, shape)
    scale = {"orig_dtype": torch.bfloat16, "orig_shape": shape, "scale": parts["scale"]}
    if fmt.name == "awq_w4a16":
        params = TensorCoreAWQW4A16Layout.Params(**scale, zeros=parts["zero"], group_size=32)
        tensors = from_state_dict(
            QuantizedTensor(parts["qdata"], "TensorCoreAWQW4A16Layout", params), {"format": fmt.name}
        )
    else:
        rest = {name: parts[name] for name in ("proj_down", "proj_up", "smooth_factor")}
        params = TensorCoreSVDQuantW4A4Layout.Params(**scale, **rest, act_unsigned=True)
        quantized = QuantizedTensor(parts["qdata"], "TensorCoreSVDQuantW4A4Layout", params)
        tensors = from_state_dict(quantized, {"format": fmt.name, "act_unsigned": True})
    layer = find_one(tensors)
    assert layer.format == fmt
    assert any("is spelled weight_" in note for note in layer.notes)
    back = COMFY.load_parts(layer, tensors.__getitem__)
    for name, part in parts.items():
        assert_same_bits(back[name], part)
