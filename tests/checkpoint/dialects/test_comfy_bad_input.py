"""Files that contradict themselves: one clear error each, which names the file and the layer."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import CheckpointError, FormatError, LowbitError, PartsError, UnknownFormatError
from lowbit.formats import formats
from tests.checkpoint.dialects.comfy_files import COMFY, LAYER, WHERE, find, marker, stored

WEIGHT, SCALE, MARKER = f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.comfy_quant"
PLACE = rf"{WHERE}: layer '{LAYER}'"
CONV = torch.zeros(8, 8, 3, 3, dtype=torch.int8)


def changed(spec: str = "fp8_e4m3", **tensors):
    """A good file with tensors replaced by the ends of their keys, or removed where None."""
    named = {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}
    whole = {**stored(spec), **named}
    return {key: tensor for key, tensor in whole.items() if tensor is not None}


BAD = {
    "marker is not JSON": (changed(comfy_quant=torch.tensor(list(b"{oops"), dtype=torch.uint8)), "not JSON"),
    "marker is no object": (changed(comfy_quant=marker(["float8_e4m3fn"])), "list, not an object"),
    "marker is cast": (changed(comfy_quant=marker({"format": "nvfp4"}).float()), r"float32 \[.*uint8"),
    "marker is a matrix": (changed(comfy_quant=marker({"format": "nvfp4"})[None]), "1-D uint8"),
    "marker twice the same name": (
        changed(comfy_quant=torch.tensor(list(b'{"format":"a","format":"b"}'), dtype=torch.uint8)),
        "'format' stands twice",
    ),
    "marker without format": (changed(comfy_quant=marker({})), "names no format"),
    "format is no string": (changed(comfy_quant=marker({"format": 8})), "expected a string"),
    "params is no object": (changed(comfy_quant=marker({"format": "nvfp4", "params": 3})), "params"),
    "marker without weight": (changed(weight=None), f"no tensor '{WEIGHT}'"),
    "no scale": (changed(weight_scale=None), "scale is missing"),
    "no global scale": (changed("nvfp4", weight_scale_2=None), r"weight_scale_2 \(global_scale\) is missing"),
    "scale of a wrong shape": (changed(weight_scale=torch.ones(3)), r"shape \[3\], expected \[\], \[128\], \[128, 1\]"),
    "codes of a wrong dtype": (changed(weight=torch.zeros(128, 256).bfloat16()), "bfloat16.*expected float8_e4m3fn"),
    "codes of the other float8": (changed(comfy_quant=marker({"format": "float8_e5m2"})), "expected float8_e5m2"),
    "fp8 labelled nvfp4": (
        changed(comfy_quant=marker({"format": "nvfp4", "orig_shape": [128, 256]}), weight_scale_2=torch.ones(())),
        r"expected uint8 \[128, 128\]",
    ),
    "integer scale": (changed(weight_scale=torch.ones((), dtype=torch.int32)), "int32.*expected float32"),
    "convolution": (changed(weight=CONV, comfy_quant=marker({"format": "int8_tensorwise"})), "not a convolution"),
    "convolution as svdquant": (changed("svdquant_w4a4", weight=CONV), r"has shape \[8, 8, 3, 3\]"),
    "bank of experts": (changed(weight=torch.zeros(2, 8, 8).to(torch.float8_e4m3fn)), "bank of experts"),
    "two spellings": (changed("awq_w4a16", weight_zeros=torch.ones(4, 128)), "both .*weight_zero'.*weight_zeros"),
    "unknown tensor": (changed(weight_correction=torch.ones(4)), "does not know: .*weight_correction"),
    "orig_shape of another weight": (
        changed("nvfp4", comfy_quant=marker({"format": "nvfp4", "orig_shape": [128, 128]})),
        "does not fit this layer",
    ),
    "orig_shape of three": (
        changed("nvfp4", comfy_quant=marker({"format": "nvfp4", "orig_shape": [1, 2, 3]})),
        "orig_shape",
    ),
    "orig_dtype unknown": (
        changed(comfy_quant=marker({"format": "float8_e4m3fn", "orig_dtype": "int4"})),
        "orig_dtype",
    ),
    "group size is text": (
        changed("awq_w4a16", comfy_quant=marker({"format": "awq_w4a16", "group_size": "64"})),
        "group_size",
    ),
    "group size of another file": (
        changed("awq_w4a16", comfy_quant=marker({"format": "awq_w4a16", "group_size": 32})),
        r"weight_scale' has shape \[4, 128\], expected \[8, 128\]",
    ),
    "group size that does not divide": (
        changed("awq_w4a16", comfy_quant=marker({"format": "awq_w4a16"}), weight_scale=torch.ones(3, 128)),
        "does not divide K = 256",
    ),
    "flag is text": (
        changed("svdquant_w4a4", comfy_quant=marker({"format": "svdquant_w4a4", "act_unsigned": "no"})),
        "true or false",
    ),
    "rotation of a tensor-wide scale": (
        changed("int8(granularity=tensor)", comfy_quant=marker({"format": "int8_tensorwise", "convrot": True})),
        "rotation",
    ),
    "rotation that does not divide": (
        changed("int8", comfy_quant=marker({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024})),
        "1024",
    ),
    "unknown layout": (
        changed("svdquant_w4a4", comfy_quant=marker({"format": "svdquant_w4a4", "layout": "x"})),
        "layout 'x'",
    ),
    "layout that is not there": (
        changed("svdquant_w4a4", comfy_quant=marker({"format": "svdquant_w4a4", "layout": "kitchen_tile_packed_w4a4"})),
        "2 axes, not 4",
    ),
    "low-rank basis unclear": (
        changed("svdquant_w4a4", comfy_quant=marker({"format": "svdquant_w4a4", "proj_down_smooth_folded": False})),
        "which input proj_down",
    ),
    "own config of another format": (
        changed(comfy_quant=marker({"format": "float8_e4m3fn", "lowbit": {"format": "fp8_e5m2"}})),
        "a program has changed",
    ),
    "own config is no object": (changed(comfy_quant=marker({"format": "float8_e4m3fn", "lowbit": 1})), "lowbit field"),
    "own config with an unknown field": (
        changed(comfy_quant=marker({"format": "float8_e4m3fn", "lowbit": {"format": "fp8_e4m3", "speed": 9}})),
        "no field speed",
    ),
    "pre_quant_scale lost": (
        changed(
            comfy_quant=marker({"format": "float8_e4m3fn", "lowbit": {"format": "fp8_e4m3", "pre_quant_scale": True}})
        ),
        "pre_quant_scale is missing",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_one_clear_error(tensors, message):
    """Each defect is found from the header and the marker alone, and the error names file and layer."""
    with pytest.raises(LowbitError, match=f"{PLACE}.*(?:{message})") as caught:
        find(tensors)
    assert isinstance(caught.value, (CheckpointError, PartsError, FormatError))
    found = find(tensors, strict=False)
    assert [(problem.layer, problem.message) for problem in found.problems] == [(LAYER, str(caught.value))]
    assert found.layers == {}


def test_unknown_format_lists_the_known_ones():
    """The error is a KeyError and a ValueError, names file and layer, and lists what can be read, sorted."""
    with pytest.raises(UnknownFormatError, match=f"'int4_blockwise' in {PLACE}") as caught:
        find(changed(comfy_quant=marker({"format": "int4_blockwise"})))
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    names = str(caught.value).partition("known formats: ")[2].split(", ")
    assert names == sorted(names)
    assert {"awq_w4a16", "float8_e4m3fn_rowwise", "int8_blockwise", "mxfp8", "nvfp4", "svdquant_w4a4"} <= set(names)
    assert len(names) == len(set(names)) >= len(formats())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "list, not an object"),
        ('{"layers": []}', "not an object of objects"),
        ('{"layers": {"a": 1}}', "not an object of objects"),
        ('{"layers": {"a": {}, "a": {}}}', "'a' stands twice"),
    ],
)
def test_header_that_cannot_be_read(text, message):
    """A broken header is an error that names the file; layers are not read as if it were not there."""
    with pytest.raises(CheckpointError, match=f"{WHERE}: .*{message}"):
        find(stored("fp8_e4m3"), {"_quantization_metadata": text})


def test_header_with_a_short_name():
    """A header that lacks the key prefix, which ComfyUI ignores, is told what the layer is called."""
    header = {"_quantization_metadata": '{"layers": {"to_q": {"format": "float8_e4m3fn"}}}'}
    with pytest.raises(CheckpointError, match=f"no tensor 'to_q.weight'; there is a layer '{LAYER}'"):
        find(changed(comfy_quant=None), header)


def test_data_that_differs_from_the_header():
    """A tensor that is not what the header said is refused at loading, too."""
    tensors = stored("fp8_e4m3")
    layer = find(tensors).layers[LAYER]
    with pytest.raises(PartsError, match=f"{PLACE}.*expected float8_e4m3fn"):
        COMFY.load_parts(layer, {**tensors, WEIGHT: torch.zeros(128, 256)}.__getitem__)


def test_every_problem_is_collected():
    """Without `strict` sound layers are found and every broken one is reported."""
    broken = {"b.comfy_quant": marker({"format": "?"}), "b.weight": torch.ones(2, 2)}
    lost = {"c.comfy_quant": marker({"format": "nvfp4"})}
    found = find({**stored("fp8_e4m3"), **broken, **lost}, strict=False)
    assert list(found.layers) == [LAYER]
    assert [problem.layer for problem in found.problems] == ["b", "c"]
    assert found.plain == list({**broken, **lost})
