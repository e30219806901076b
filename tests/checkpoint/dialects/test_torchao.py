"""torchao's safetensors: against torchao's own tensor classes, written and read on the CPU."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lowbit
from lowbit.checkpoint.dialects import Container, StoredLayer, TensorSpec, detect_dialect, get_dialect
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.support import gaussian
from tests.support.other_device import back, needs_stand_in, other_device, there

DIALECT = get_dialect("torchao")
LAYER = "layers.0.q"
N, K = 48, 128
SPECS = {
    "awq_w4a16(group_size=32)": "Int4Tensor",
    "awq_w4a16(pre_quant_scale=true)": "Int4Tensor",
    "wna16(group_size=32)": "IntxUnpackedToInt8Tensor",
    "wna16(bits=3,group_size=0,zero_point=true)": "IntxUnpackedToInt8Tensor",
    "wna16(bits=8,group_size=64,zero_point=true)": "IntxUnpackedToInt8Tensor",
    "int8": "Int8Tensor",
    "int8(granularity=tensor,activations=none)": "Int8Tensor",
    "int8(granularity=block,block_size=1x32)": "Int8Tensor",
    "int8(input_scale=true,pre_quant_scale=true)": "Int8Tensor",
    "fp8_e4m3": "Float8Tensor",
    "fp8_e5m2(granularity=row)": "Float8Tensor",
    "fp8_e4m3(granularity=block,block_size=16x64)": "Float8Tensor",
    "mxfp8": "MXTensor",
    "mxfp4": "MXTensor",
    "nvfp4": "NVFP4Tensor",
    "nvfp4(input_scale=true)": "NVFP4Tensor",
}


@pytest.fixture(scope="module")
def ao():
    """torchao's functions and classes by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        from torchao import quantization
        from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
        from torchao.prototype.safetensors import safetensors_support, safetensors_utils
    modules = (quantization, mx_tensor, nvfp4_tensor, safetensors_support, safetensors_utils)
    return {name: value for module in modules for name, value in vars(module).items()}


def container(tensors, metadata) -> Container:
    """A file with these tensors and this header metadata."""
    return Container({key: TensorSpec.of(t) for key, t in tensors.items()}, metadata, where="model.safetensors")


def find(tensors, metadata, dialect: str = "torchao"):
    """The one layer of a file."""
    (layer,) = get_dialect(dialect).find_layers(container(tensors, metadata), tensors.__getitem__).layers.values()
    return layer


def layer_and_parts(spec: str, dtype=torch.bfloat16):
    """A layer to write, and the parts of a Gaussian weight."""
    fmt = parse_spec(spec)
    parts = fmt.plain.quantize(gaussian(N, K, dtype=dtype) + 0.1)
    if fmt.input_scale:
        parts["input_scale"] = torch.tensor(0.25)
    if fmt.pre_quant_scale:
        parts["pre_quant_scale"] = (gaussian(1, K, dtype=dtype).abs() + 0.5).reshape(K)
    return StoredLayer(LAYER, fmt, (N, K), dtype), parts


def written(spec: str, plain=None, dtype=torch.bfloat16):
    """The tensors and the header metadata of a file with one layer."""
    stored, parts = layer_and_parts(spec, dtype)
    tensors = DIALECT.store_parts(stored, parts)
    others = {key: TensorSpec.of(tensor) for key, tensor in (plain or {}).items()}
    return {**tensors, **(plain or {})}, DIALECT.header_metadata([stored], others)


def rewritten(layer, parts):
    """The tensors and the header metadata of a layer that was read, written again."""
    return DIALECT.store_parts(layer, parts), DIALECT.header_metadata([layer], {})


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_comes_back_bit_for_bit(spec, dtype):
    """What is written is promised beforehand, described in the header, and read back with the same bits."""
    stored, parts = layer_and_parts(spec, dtype)
    tensors, metadata = written(spec, dtype=dtype)
    assert {key: TensorSpec.of(t) for key, t in tensors.items()} == DIALECT.stored_specs(stored)
    assert json.loads(metadata[f"{LAYER}.weight"])["_type"] == SPECS[spec]
    assert detect_dialect(container(tensors, metadata)) is DIALECT
    layer = find(tensors, metadata)
    assert (layer.format, layer.shape, layer.dtype) == (stored.format, stored.shape, dtype)
    assert set(layer.keys.values()) == set(tensors)
    for name, part in DIALECT.load_parts(layer, tensors.__getitem__).items():
        assert_same_bits(part, parts[name])
    again, described = rewritten(layer, parts)
    assert described == metadata
    for key, tensor in tensors.items():
        assert_same_bits(again[key], tensor)


@pytest.mark.parametrize("spec", [spec for spec, kind in SPECS.items() if kind != "Int4Tensor"])
def test_what_is_written_decodes_the_same_in_torchao(spec, ao):
    """torchao makes its tensors of our files, and they dequantize to our bits."""
    stored, parts = layer_and_parts(spec)
    plain = {"layers.0.q.bias": torch.zeros(N), "position": torch.zeros(3)}
    tensors, metadata = written(spec, plain)
    result, rest = ao["unflatten_tensor_state_dict"](tensors, metadata)
    assert set(result) == {f"{LAYER}.weight", f"{LAYER}.bias"}
    assert set(rest) == {"position"}
    theirs = result[f"{LAYER}.weight"]
    assert type(theirs).__name__ == SPECS[spec]
    assert theirs.shape == (N, K)
    assert theirs.dtype == torch.bfloat16
    ours = stored.format.plain.dequantize(
        {k: v for k, v in parts.items() if k != "pre_quant_scale"}, (N, K), torch.bfloat16
    )
    assert_same_bits(theirs.dequantize(), ours)


def torchao_weights(ao, w):
    """Name -> a weight of every class that torchao can make on a CPU, and the format it is."""
    row, tensor, group, block = ao["PerRow"](), ao["PerTensor"](), ao["PerGroup"](32), ao["PerBlock"]([16, 64])
    dynamic = ao["QuantizeTensorToInt8Kwargs"](granularity=row)
    int8, float8, intx = ao["Int8Tensor"].from_hp, ao["Float8Tensor"].from_hp, ao["IntxUnpackedToInt8Tensor"].from_hp
    mx, nv, asymmetric = ao["MXTensor"].to_mx, ao["NVFP4Tensor"].to_nvfp4, ao["MappingType"].ASYMMETRIC
    share = ao["per_tensor_amax_to_scale"](w.abs().amax())
    fp4 = torch.float4_e2m1fn_x2
    return {
        "int8": (int8(w, row), "int8(activations=none)"),
        "int8 dynamic": (int8(w, row, act_quant_kwargs=dynamic), "int8"),
        "int8 tensor": (int8(w, tensor), "int8(granularity=tensor,activations=none)"),
        "int8 group": (int8(w, group), "int8(granularity=block,block_size=1x32,activations=none)"),
        "int8 zeros": (int8(w, row, mapping_type=asymmetric), "wna16(bits=8,group_size=0,zero_point=true)"),
        "fp8 row": (float8(w, granularity=row), "fp8_e4m3(granularity=row)"),
        "fp8 tensor": (float8(w, torch.float8_e5m2, tensor), "fp8_e5m2"),
        "fp8 block": (float8(w, granularity=block), "fp8_e4m3(granularity=block,block_size=16x64)"),
        "int4": (intx(w, (1, 32), torch.int4), "wna16(group_size=32)"),
        "int3": (intx(w, (1, K), torch.int3, mapping_type=asymmetric), "wna16(bits=3,group_size=0,zero_point=true)"),
        "mxfp8": (mx(w, torch.float8_e4m3fn), "mxfp8"),
        "mxfp8 tiles": (mx(w, torch.float8_e4m3fn, is_swizzled_scales=True), "mxfp8"),
        "mxfp4": (mx(w, fp4), "mxfp4"),
        "mxfp4 tiles": (mx(w, fp4, is_swizzled_scales=True), "mxfp4"),
        "nvfp4": (nv(w, per_tensor_scale=share), "nvfp4"),
        "nvfp4 alone": (nv(w), "nvfp4"),
        "nvfp4 tiles": (nv(w, per_tensor_scale=share, act_per_tensor_scale=share, is_swizzled_scales=True),
                        "nvfp4(input_scale=true)"),
    }  # fmt: skip


NAMES = (
    *("int8", "int8 dynamic", "int8 tensor", "int8 group", "int8 zeros", "fp8 row", "fp8 tensor", "fp8 block", "int4"),
    *("int3", "mxfp8", "mxfp8 tiles", "mxfp4", "mxfp4 tiles", "nvfp4", "nvfp4 alone", "nvfp4 tiles"),
)


@pytest.mark.parametrize("n", [N, 160])
@pytest.mark.parametrize("name", NAMES)
def test_files_of_torchao_are_read_and_written_again(name, n, ao):
    """Every class is read as the format it is, decodes to torchao's bits, and is written again byte for byte."""
    weight, spec = torchao_weights(ao, gaussian(n, K, dtype=torch.bfloat16) + 0.3)[name]
    tensors, metadata = ao["flatten_tensor_state_dict"]({f"{LAYER}.weight": weight, f"{LAYER}.bias": torch.zeros(n)})
    layer = find(tensors, metadata)
    assert layer.format == parse_spec(spec)
    parts = DIALECT.load_parts(layer, tensors.__getitem__)
    assert_same_bits(layer.format.dequantize(parts, (n, K), torch.bfloat16), weight.dequantize())
    again, described = rewritten(layer, parts)
    assert described[f"{LAYER}.weight"] == metadata[f"{LAYER}.weight"]
    assert {f"{LAYER}.bias", *again} == set(tensors)
    for key, tensor in again.items():
        assert_same_bits(tensor, tensors[key])


@needs_stand_in
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_where_the_tensors_of_the_file_are(name, ao):
    """Those that a file leaves out, too, when a model is loaded on a device."""
    weight, _ = torchao_weights(ao, gaussian(N, K, dtype=torch.bfloat16) + 0.3)[name]
    tensors, metadata = ao["flatten_tensor_state_dict"]({f"{LAYER}.weight": weight})
    layer = find(tensors, metadata)
    expected = DIALECT.load_parts(layer, tensors.__getitem__)
    with other_device():
        parts = DIALECT.load_parts(layer, there(tensors).__getitem__)
    for part, tensor in expected.items():
        assert_same_bits(back(parts[part]), tensor)


def test_a_name_list_of_another_shard_is_passed_over():
    """Of merged headers every entry counts; layers that lie in a file not at hand are left out, torn ones an error."""
    tensors, metadata = written("int8")
    other = metadata[f"{LAYER}.weight"]
    merged = {**metadata, "layers.9.q.weight": other, "tensor_names": '["layers.9.q.weight"]', "format": "pt"}
    found = DIALECT.find_layers(container(tensors, merged), tensors.__getitem__)
    assert list(found.layers) == [LAYER]
    torn = {key: tensor for key, tensor in tensors.items() if not key.endswith("scale")}
    with pytest.raises(CheckpointError, match=r"lacks layers\.0\.q\._weight_scale; name the index or the folder"):
        find(torn, metadata)


def test_plain_files_are_not_torchaos():
    """A header that lists plain tensors only, or has entries without a list, is not in this dialect."""
    tensors, metadata = written("int8")
    plain = {"a.bias": '{"_type": "Tensor"}', "tensor_names": '["a.bias"]'}
    assert not DIALECT.detect(container({}, plain))
    assert not DIALECT.detect(
        container(tensors, {key: text for key, text in metadata.items() if key != "tensor_names"})
    )
    assert DIALECT.header_metadata([], {"a.bias": TensorSpec(torch.float32, (3,))}) == {}


def changed(spec: str, **changes):
    """A written file in whose entry `_type`, or fields of `_data`, are others."""
    tensors, metadata = written(spec)
    entry = json.loads(metadata[f"{LAYER}.weight"])
    entry["_type"] = changes.pop("_type", entry["_type"])
    entry["_data"] |= changes
    return tensors, {**metadata, f"{LAYER}.weight": json.dumps(entry)}


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ("int8", {"_type": "NF4Tensor"}, "class NF4Tensor is unknown; lowbit reads Float8Tensor, Int4Tensor"),
        ("int8", {"_type": "Int4TilePackedTo4dTensor"}, "packed for one kernel"),
        ("int8", {"block_size": [1, 64]}, "scale is float32"),
        ("int8", {"block_size": "row"}, "expected two sizes"),
        ("int8", {"dtype": "bfloat16"}, "expected a dtype"),
        ("mxfp8", {"block_size": 64}, "blocks of 64, expected 32"),
        ("mxfp8", {"elem_dtype": "fp6_e2m3"}, "fp6_e2m3, expected float8_e4m3fn"),
        ("mxfp8", {"is_swizzled_scales": True}, "scale is float8_e8m0fnu"),
        ("nvfp4", {"is_swizzled_scales": 1}, "expected true or false"),
        ("wna16(group_size=32)", {"target_dtype": {"_type": "torch.dtype", "_data": "int1"}}, "int2 to int8"),
        ("wna16(group_size=32)", {"block_size": [2, 32]}, "groups along K"),
        ("awq_w4a16(group_size=32)", {"shape": [N, K + 2]}, "only groups along K"),
    ],
)
def test_entries_that_do_not_fit_are_errors(spec, changes, message):
    """Unknown classes, damaged attributes and contradictions name the layer and what was expected."""
    tensors, metadata = changed(spec, **changes)
    with pytest.raises((CheckpointError, PartsError), match=f"layers.0.q.*{message}"):
        find(tensors, metadata)
    found = DIALECT.find_layers(container(tensors, metadata), tensors.__getitem__, strict=False)
    assert [problem.layer for problem in found.problems] == [LAYER]
    assert found.plain == list(tensors)


def test_activations_keep_what_they_say(ao):
    """Nested settings of how activations are rounded survive a round trip, and their tensors load in torchao."""
    settings = {"_type": "PerTensor", "_data": {}}
    nested = {"granularity": settings, "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}}
    kwargs = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {**nested, "reduce_range": True}}
    tensors, metadata = changed("int8", act_quant_kwargs=kwargs, reduce_range=True)
    layer = find(tensors, metadata)
    again = rewritten(layer, DIALECT.load_parts(layer, tensors.__getitem__))[1]
    assert json.loads(again[f"{LAYER}.weight"]) == json.loads(metadata[f"{LAYER}.weight"])
    (theirs,) = ao["unflatten_tensor_state_dict"](tensors, again)[0].values()
    assert theirs.act_quant_kwargs.reduce_range is True


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("wna16(act_order=true)", (48, 128)),
        ("wna16", (48, 100)),
        ("int8(rotation=64)", (48, 128)),
        ("int8(granularity=block)", (48, 128)),
        ("int8(granularity=block,block_size=1x128)", (48, 128)),
        ("int8(block_size=64x64)", (48, 128)),
        ("fp8_e4m3(input_scale=true)", (48, 128)),
        ("fp8_e4m3(granularity=block)", (48, 128)),
        ("nvfp4(row_global_scale=true)", (48, 128)),
        ("nvfp4", (48, 120)),
        ("mxfp4(pre_quant_scale=true)", (48, 128)),
        ("svdquant_w4a4", (128, 128)),
    ],
)
def test_what_torchao_cannot_hold_is_refused(spec, shape):
    """Formats and shapes without a place are refused in words before anything is written."""
    stored = StoredLayer(LAYER, parse_spec(spec), shape)
    assert DIALECT.refuses(stored)
    with pytest.raises(PartsError, match=LAYER):
        DIALECT.stored_specs(stored)
    assert DIALECT.refuses(StoredLayer("", parse_spec("int8"), (48, 128)))


def test_a_zero_point_of_16_does_not_fit():
    """wna16 may hold 2 ** bits as a zero point, torchao's signed byte may not."""
    stored, parts = layer_and_parts("wna16(group_size=32,zero_point=true)")
    parts["zero_point"][0, 0] = 16
    with pytest.raises(PartsError, match="zero point of 16, and torchao stores 4 bits"):
        DIALECT.store_parts(stored, parts)


def test_a_saved_module_loads_in_torchao(ao, tmp_path):
    """A file of `lowbit.save` is one of torchao's, and `lowbit.load` reads it back."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32)).to(torch.bfloat16)
    outer = torch.nn.ModuleDict({"net": model})
    fresh = copy.deepcopy(outer)
    lowbit.quantize_(outer, "int8(activations=none)")
    path = lowbit.save(outer, tmp_path / "model.safetensors", dialect="torchao")
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    theirs = ao["unflatten_tensor_state_dict"](tensors, metadata)[0]
    assert_same_bits(theirs["net.0.weight"].dequantize(), model[0].weight.dequantize())
    lowbit.load(fresh, path)
    assert_same_bits(fresh["net"][1].weight.dequantize(), model[1].weight.dequantize())


def test_nothing_of_the_description_outlives_its_layers(tmp_path):
    """Shards migrated to another dialect have no entry of torchao's header left, and every layer is there."""
    stored, parts = layer_and_parts("int8")
    index = {}
    for name in ("a", "b"):
        layer = replace(stored, layer=f"net.{name}")
        tensors = {**DIALECT.store_parts(layer, parts), f"net.{name}.bias": torch.zeros(N)}
        plain = {f"net.{name}.bias": TensorSpec(torch.float32, (N,))}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=DIALECT.header_metadata([layer], plain))
        index |= dict.fromkeys(tensors, f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with open_source(tmp_path / "model.safetensors.index.json") as source:
        report = migrate(source, tmp_path / "out", to="comfy")
    assert set(report.layers) == {"net.a", "net.b"}
    with open_source(tmp_path / "out") as source:
        metadata = [file.metadata for file in source.files.values()]
    assert not [key for entry in metadata for key in entry if key.startswith("net.") or key == "tensor_names"]
