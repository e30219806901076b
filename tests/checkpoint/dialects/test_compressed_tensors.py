"""The compressed-tensors dialect, against the compressors of the package that owns it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit.checkpoint.dialects import Container, StoredLayer, TensorSpec, detect_dialect, get_dialect
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.support import gaussian

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

DIALECT = get_dialect("compressed_tensors")
LAYER = "model.layers.0.self_attn.q_proj"
SHAPE = (48, 256)


def arguments(bits: int, kind: str, strategy: str, **more) -> QuantizationArgs:
    """Quantization arguments of weights."""
    return QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **more)


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
CASES = {
    "w4a16": ("pack-quantized", arguments(4, "int", "group", group_size=64), None, "wna16(group_size=64)"),
    "w4a16 asymmetric": (
        "pack-quantized",
        arguments(4, "int", "group", group_size=64, symmetric=False),
        None,
        "wna16(group_size=64,zero_point=True)",
    ),
    "w8a16 channel": ("pack-quantized", arguments(8, "int", "channel"), None, "wna16(bits=8,group_size=0)"),
    "w3a16": ("pack-quantized", arguments(3, "int", "group", group_size=32), None, "wna16(bits=3,group_size=32)"),
    "w5a16 asymmetric": (
        "pack-quantized",
        arguments(5, "int", "group", group_size=32, symmetric=False),
        None,
        "wna16(bits=5,group_size=32,zero_point=True)",
    ),
    "w8a8": ("int-quantized", arguments(8, "int", "channel"), TOKEN, "int8"),
    "w8a8 asymmetric": (
        "int-quantized",
        arguments(8, "int", "channel", symmetric=False),
        TOKEN,
        "wna16(bits=8,group_size=0,zero_point=True)",
    ),
    "fp8 tensor": ("float-quantized", arguments(8, "float", "tensor"), None, "fp8_e4m3"),
    "fp8 channel": ("float-quantized", arguments(8, "float", "channel"), None, "fp8_e4m3(granularity=row)"),
    "fp8 block": (
        "float-quantized",
        arguments(8, "float", "block", block_structure=[32, 64]),
        None,
        "fp8_e4m3(granularity=block,block_size=32x64)",
    ),
    "nvfp4a16": (
        "nvfp4-pack-quantized",
        arguments(4, "float", "tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
        None,
        "nvfp4(global_scale_divides=True)",
    ),
    "mxfp4a16": (
        "mxfp4-pack-quantized",
        arguments(4, "float", "group", group_size=32, scale_dtype=torch.uint8),
        None,
        "mxfp4",
    ),
    "mxfp8a16": (
        "mxfp8-quantized",
        arguments(8, "float", "group", group_size=32, scale_dtype=torch.uint8),
        None,
        "mxfp8",
    ),
}


def extremes(w: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest weight of whatever shares a scale."""
    strategy = str(args.strategy)
    if strategy == "tensor":
        return w.amin().reshape(1), w.amax().reshape(1)
    if strategy == "block":
        rows, columns = args.block_structure
        n, k = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
        padded = torch.zeros(n * rows, k * columns, dtype=w.dtype)
        padded[: w.shape[0], : w.shape[1]] = w
        tiles = padded.view(n, rows, k, columns)
        return tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    groups = w.unflatten(1, (-1, args.group_size)) if "group" in strategy else w.unsqueeze(1)
    return groups.amin(-1), groups.amax(-1)


def compressed(case: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    """What the owner stores of a weight, what it decodes to, and the configuration that goes with it."""
    name, args, activations, _ = CASES[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations, format=name)
    w = gaussian(*SHAPE, dtype=dtype)
    low, high = extremes(w, args)
    state = {"weight": w}
    more = {}
    if name.startswith("nvfp4"):
        state["weight_global_scale"] = generate_gparam(w.amin(), w.amax()).reshape(1)
        more = {"global_scale": state["weight_global_scale"]}
    scale, zero = calculate_qparams(low, high, args, **more)
    state |= {"weight_scale": scale if name.startswith("nvfp4") else scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = {key: value.detach() for key, value in compressor.compress(state, scheme).items() if value is not None}
    back = compressor.decompress(dict(stored), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    return {f"{LAYER}.{key}": value for key, value in stored.items()}, back, config


def container(tensors: dict[str, torch.Tensor], config: dict) -> Container:
    """A folder with these tensors and this configuration."""
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    return Container(specs, configs={"config.json": {"quantization_config": config}}, where="folder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_the_owner_wrote_decodes_to_its_bits_and_is_written_again(case, dtype):
    """Format, shape and every decoded bit are the owner's, and what is written again is what was read."""
    tensors, expected, config = compressed(case, dtype)
    held = container(tensors, config)
    assert DIALECT.detect(held)
    (layer,) = DIALECT.find_layers(held, tensors.__getitem__).layers.values()
    assert (layer.format, layer.shape) == (parse_spec(CASES[case][3]), SHAPE)
    assert set(layer.keys.values()) == set(tensors)
    parts = DIALECT.load_parts(layer, tensors.__getitem__)
    decoded = layer.format.dequantize(parts, layer.shape, expected.dtype)
    assert torch.equal(decoded, expected), (decoded - expected).abs().max()
    again = DIALECT.store_parts(layer, parts)
    assert DIALECT.refuses(layer) is None
    assert {key: TensorSpec.of(tensor) for key, tensor in again.items()} == DIALECT.stored_specs(layer)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_same_bits(again[key], tensor)


@pytest.mark.parametrize("case", CASES)
def test_what_lowbit_writes_the_owner_decodes(case):
    """A layer that lowbit quantized is decoded by the owner, by the configuration that lowbit wrote, to the same."""
    fmt = parse_spec(CASES[case][3])
    stored = StoredLayer(LAYER, fmt, SHAPE, torch.float32)
    parts = fmt.quantize(gaussian(*SHAPE))
    tensors = DIALECT.store_parts(stored, parts)
    plain = {"lm_head.weight": TensorSpec(torch.float32, (8, 8)), "norm.weight": TensorSpec(torch.float32, (8,))}
    config = DIALECT.config_fields([stored], plain)["config.json"]["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    group = {key: value for key, value in config["config_groups"]["group_0"].items() if key != "output_activations"}
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    local = {key.removeprefix(f"{LAYER}."): tensor for key, tensor in tensors.items()}
    expected = compressor.decompress(local, scheme)["weight"]
    assert torch.equal(fmt.dequantize(parts, SHAPE, expected.dtype), expected)
    (back,) = DIALECT.find_layers(container(tensors, config), tensors.__getitem__).layers.values()
    assert (back.format, back.shape) == (fmt, SHAPE)


@pytest.mark.parametrize(("shape", "size"), [((1, 32), 32), ((7, 96), 32), ((33, 160), 32), ((5, 45), 0)])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_odd_widths_and_row_counts_of_packed_integers(bits, zero_point, shape, size):
    """Codes and zero points of every width come back bit for bit from words that they do not fill."""
    fmt = parse_spec(f"wna16(bits={bits},group_size={size},zero_point={zero_point})")
    stored = StoredLayer(LAYER, fmt, shape, torch.float16)
    parts = fmt.quantize(gaussian(*shape, dtype=torch.float16))
    tensors = DIALECT.store_parts(stored, parts)
    assert {key: TensorSpec.of(tensor) for key, tensor in tensors.items()} == DIALECT.stored_specs(stored)
    config = DIALECT.config_fields([stored], {})["config.json"]["quantization_config"]
    codes = fmt.unpack(parts["qdata"], shape[1])[:, : shape[1]].to(torch.int16) - (1 << (bits - 1))
    assert_same_bits(tensors[f"{LAYER}.weight_packed"], pack_to_int32(codes.to(torch.int8), bits))
    (layer,) = DIALECT.find_layers(container(tensors, config), tensors.__getitem__).layers.values()
    back = DIALECT.load_parts(layer, tensors.__getitem__)
    for name, part in parts.items():
        assert_same_bits(back[name], part)


def test_several_schemes_name_their_layers():
    """Layers of several formats stand in groups that name them, and each is read by its own."""
    specs = {"a.q": "wna16(group_size=32)", "a.k": "int8", "b.q": "wna16(group_size=32)"}
    layers = [StoredLayer(name, parse_spec(spec), (16, 64)) for name, spec in specs.items()]
    tensors = {}
    for layer in layers:
        tensors |= DIALECT.store_parts(layer, layer.format.quantize(gaussian(16, 64, dtype=torch.bfloat16)))
    config = DIALECT.config_fields(layers, {})["config.json"]["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [["a.q", "b.q"], ["a.k"]]
    found = DIALECT.find_layers(container(tensors, config), tensors.__getitem__)
    assert {name: layer.format for name, layer in found.layers.items()} == {
        layer.layer: layer.format for layer in layers
    }


@pytest.mark.parametrize(
    "spec",
    [
        "awq_w4a16",
        "svdquant_w4a4",
        "fp8_e5m2",
        "int8(activations=none)",
        "int8(rotation=64)",
        "int8(granularity=block)",
        "fp8_e4m3(pre_quant_scale=true)",
        "nvfp4",
    ],
)
def test_formats_without_a_scheme_are_refused_in_words(spec):
    """A format that the convention cannot express is refused before anything is written."""
    stored = StoredLayer(LAYER, parse_spec(spec), (128, 256))
    assert DIALECT.refuses(stored)
    with pytest.raises(PartsError, match=LAYER):
        DIALECT.stored_specs(stored)


def broken(change) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the configuration of a sound layer after a change to them."""
    tensors, _, config = compressed("w4a16", torch.bfloat16)
    folder = SimpleNamespace(tensors=tensors, config=json.loads(json.dumps(config)))
    change(folder)
    return folder.tensors, folder.config


BROKEN = {
    "lacks .*weight_scale": lambda f: f.tensors.pop(f"{LAYER}.weight_scale"),
    "lacks .*weight_shape": lambda f: f.tensors.pop(f"{LAYER}.weight_shape"),
    "ignore list": lambda f: f.config["ignore"].append("re:.*q_proj"),
    "no group of config.json names it": lambda f: f.config["config_groups"]["group_0"].update(targets=["re:.*k_proj"]),
    "no config_groups": lambda f: f.config.pop("config_groups"),
    "a preset's name": lambda f: f.config.update(config_groups={"W4A16": ["Linear"]}),
    "marlin-24": lambda f: f.config["config_groups"]["group_0"].update(format="marlin-24"),
    "'other' of compressed-tensors is unknown": lambda f: f.config["config_groups"]["group_0"].update(format="other"),
    "expected .* for 48 x 512 weights": lambda f: f.tensors.update({f"{LAYER}.weight_shape": torch.tensor([48, 512])}),
    "no regular expression": lambda f: f.config["ignore"].append("re:("),
    "has weight_zero_point|has weight_global_scale": lambda f: f.tensors.update(
        {f"{LAYER}.weight_global_scale": torch.ones(1)}
    ),
    r"num_bits \[4\], expected a whole": lambda f: f.config["config_groups"]["group_0"]["weights"].update(num_bits=[4]),
    "num_bits 0, expected a whole": lambda f: f.config["config_groups"]["group_0"]["weights"].update(num_bits=0),
    "group_size '64', expected": lambda f: f.config["config_groups"]["group_0"]["weights"].update(group_size="64"),
    "strategy token": lambda f: f.config["config_groups"]["group_0"]["weights"].update(strategy="token"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_contradictions_are_one_clear_error(message):
    """Descriptions that are missing, unknown or at odds with the tensors name the folder, the layer and the remedy."""
    tensors, config = broken(BROKEN[message])
    with pytest.raises(CheckpointError, match=message):
        DIALECT.find_layers(container(tensors, config), tensors.__getitem__)


def test_old_packing_is_told_from_the_current_one():
    """Codes of 3 bits packed ten to a word, as years ago, are refused instead of read as something else."""
    tensors, config = broken(lambda f: f.config["config_groups"]["group_0"]["weights"].update(num_bits=3))
    tensors[f"{LAYER}.weight_packed"] = torch.zeros(48, 26, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="old versions of compressed-tensors"):
        DIALECT.find_layers(container(tensors, config), tensors.__getitem__)


def test_static_activation_scales_travel():
    """A static input scale is a part of the layer, and is written where it was."""
    tensors, _, config = compressed("fp8 tensor", torch.bfloat16)
    tensors[f"{LAYER}.input_scale"] = torch.tensor([0.25])
    (layer,) = DIALECT.find_layers(container(tensors, config), tensors.__getitem__).layers.values()
    assert layer.format == parse_spec("fp8_e4m3(input_scale=true)")
    parts = DIALECT.load_parts(layer, tensors.__getitem__)
    assert parts["input_scale"].item() == 0.25
    again = DIALECT.store_parts(layer, parts)
    assert_same_bits(again[f"{LAYER}.input_scale"], tensors[f"{LAYER}.input_scale"])
    assert DIALECT.refuses(replace(layer, options={})) is None


@pytest.mark.parametrize("value", [[1 / 2688], [0.0], [float("nan")], [float("inf")], []])
def test_a_factor_in_place_of_a_divisor_is_caught(value):
    """A global scale that no weight can have is an error that names both readings, or says that it was never set."""
    tensors, _, config = compressed("nvfp4a16", torch.bfloat16)
    tensors[f"{LAYER}.weight_global_scale"] = torch.tensor(value)
    with pytest.raises(CheckpointError, match=r"ModelOpt and ComfyUI store|never set"):
        DIALECT.find_layers(container(tensors, config), tensors.__getitem__)


@pytest.mark.parametrize(
    ("method", "key", "shape"),
    [("bitsandbytes", "a.weight", (512, 1)), ("mxfp4", "mlp.experts.gate_up_proj_blocks", (4, 64, 2, 16))],
)
def test_a_method_that_nobody_reads_is_refused_by_name(method, key, shape):
    """Codes of another method are neither plain nor guessed at; plain weights beside such a config are plain."""
    config = {"config.json": {"quantization_config": {"quant_method": method}}}
    held = Container({key: TensorSpec(torch.uint8, shape)}, configs=config, where="folder")
    with pytest.raises(CheckpointError, match=rf"folder: config\.json says quant_method '{method}'.*reads awq"):
        detect_dialect(held)
    plain = Container({"a.weight": TensorSpec(torch.bfloat16, (32, 32))}, configs=config)
    assert detect_dialect(plain) is None


@pytest.mark.parametrize("case", ["nvfp4a16", "fp8 tensor"])
@pytest.mark.parametrize("axes", [1, 3])
def test_codes_that_are_no_matrix_are_named(case, axes):
    """A bank of experts, or codes that a program flattened, is one error about the layer."""
    tensors, _, config = compressed(case, torch.bfloat16)
    key = next(f"{LAYER}.{name}" for name in ("weight_packed", "weight") if f"{LAYER}.{name}" in tensors)
    tensors[key] = tensors[key].flatten() if axes == 1 else tensors[key].unsqueeze(0)

    with pytest.raises(CheckpointError, match=rf"layer '{LAYER}': its \w+ is .* expected a matrix"):
        DIALECT.find_layers(container(tensors, config), tensors.__getitem__)
