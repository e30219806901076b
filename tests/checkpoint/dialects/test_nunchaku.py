"""Layers of nunchaku: their tensors taken out of the order of its kernels, biases too, and read as formats."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.dialects import Container, TensorSpec, detect_dialect, get_dialect
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import parse_spec
from lowbit.integrations.hf_files import describe_files
from lowbit.layouts import nunchaku_tiles as tiles
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.support import gaussian

DIALECT = get_dialect("nunchaku")
N, K, R = 128, 256, 32
LITE = {"config.json": {"quantization_config": {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}}}


def svdquant(layer: str, old_names: bool = False):
    """Plain parts of a weight, its bias, and the tensors of nunchaku that hold them."""
    parts = parse_spec(f"svdquant_w4a4(rank={R})").quantize(gaussian(N, K, dtype=torch.bfloat16))
    bias, smooth = torch.arange(N).bfloat16(), torch.empty(K, dtype=torch.bfloat16)
    smooth[tiles.channel_places(K)] = parts["smooth_factor"]
    stored = torch.empty_like(bias)
    stored[tiles.channel_places(N)] = bias
    names = ("smooth", "smooth_orig", "lora_down", "lora_up")
    names = names if old_names else ("smooth_factor", "smooth_factor_orig", "proj_down", "proj_up")
    tensors = {
        "qweight": tiles.tile_codes(parts["qdata"]),
        "wscales": tiles.tile_scales(parts["scale"]),
        names[0]: smooth,
        names[1]: smooth.clone(),
        names[2]: tiles.tile_down(parts["proj_down"]),
        names[3]: tiles.tile_up(parts["proj_up"]),
        "bias": stored,
    }
    return parts, bias, {f"{layer}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def awq(layer: str, groups: int = K // 64):
    """Codes, scales and offsets of an AWQ layer, and the tensors that hold them; scales padded to `groups` rows."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator).view(torch.int8)
    scale, zero = torch.zeros(groups, N).bfloat16(), torch.zeros(groups, N).bfloat16()
    scale[: K // 64] = (torch.rand(K // 64, N, generator=generator) + 0.01).bfloat16()
    zero[: K // 64] = -(scale[: K // 64].float() * torch.randint(0, 16, (K // 64, N), generator=generator)).bfloat16()
    stored = {"qweight": tiles.tile_awq(codes), "wscales": scale, "wzeros": zero, "bias": torch.arange(N).bfloat16()}
    return codes, scale, zero, {f"{layer}.{name}": tensor for name, tensor in stored.items()}


def find(tensors, metadata=None, configs=None, **how):
    """What a file holds."""
    held = Container({key: TensorSpec.of(t) for key, t in tensors.items()}, metadata or {}, configs or {}, "file")
    assert detect_dialect(held) is DIALECT
    return DIALECT.find_layers(held, tensors.__getitem__, **how)


@pytest.mark.parametrize("old_names", [False, True])
def test_svdquant_layers_are_taken_out_of_their_tiles(old_names):
    """Every part comes back with its bits, and the order of the bias is known, under old and new names."""
    parts, bias, tensors = svdquant("blocks.0.attn.to_qkv", old_names)
    found = find(tensors)
    (layer,) = found.layers.values()
    assert (layer.layer, layer.shape, layer.dtype) == ("blocks.0.attn.to_qkv", (N, K), torch.bfloat16)
    assert layer.format == parse_spec(f"svdquant_w4a4(rank={R})")
    assert found.plain == ["blocks.0.attn.to_qkv.bias"]
    assert set(layer.keys.values()) == tensors.keys() - set(found.plain)
    for name, part in DIALECT.load_parts(layer, tensors.__getitem__).items():
        assert_same_bits(part, parts[name])
    stored, places = tensors[found.plain[0]], found.orders[found.plain[0]]
    assert not torch.equal(stored, bias)
    assert torch.equal(stored[places], bias)


@pytest.mark.parametrize("groups", [K // 64, 16])
def test_awq_layers_decode_as_nunchaku_computes_them(groups):
    """code * scale + wzero, whatever rows pad the scales; the bias is in its natural order already."""
    codes, scale, zero, tensors = awq("img_mod.1", groups)
    found = find(tensors)
    (layer,) = found.layers.values()
    assert (layer.format, layer.shape) == (parse_spec("awq_w4a16(wzeros=bfloat16)"), (N, K))
    assert not found.orders
    parts = DIALECT.load_parts(layer, tensors.__getitem__)
    raw = codes.view(torch.uint8)
    q = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1).double()
    by_column = [part[: K // 64].double().t().repeat_interleave(64, dim=1) for part in (scale, zero)]
    expected = (q * by_column[0] + by_column[1]).float()
    assert torch.equal(layer.format.dequantize(parts, (N, K), torch.float32), expected)


@pytest.mark.parametrize(
    ("layer", "metadata", "configs", "infer", "unsigned"),
    [
        ("transformer_blocks.0.mlp_fc2", {}, {}, True, True),
        ("single_transformer_blocks.0.mlp_fc2", {}, {}, True, True),
        ("transformer_blocks.0.img_mlp.net.2", {}, {}, True, True),
        ("transformer_blocks.0.img_mlp.net.2", {}, {}, False, False),
        ("transformer_blocks.0.img_mlp.net.2", {}, LITE, True, False),
        ("transformer_blocks.0.img_mlp.net.0.proj", {}, {}, True, False),
        ("blocks.0.ff.net.2", {}, {}, True, False),
        ("blocks.0.ff.net.2", {"model_class": "NunchakuSDXLUNet2DConditionModel"}, {}, True, False),
        ("blocks.0.ff.net.2", {"model_class": "NunchakuFluxTransformer2DModelV2"}, {}, True, True),
        ("blocks.0.ff.net.2", {"model_class": "NunchakuFluxTransformer2DModelV2"}, LITE, True, False),
    ],
)
def test_activations_after_a_gelu_are_unsigned_where_nunchaku_has_them_so(layer, metadata, configs, infer, unsigned):
    """By the names of nunchaku's own models; never in diffusers' files, nor when asked not to infer."""
    found = find(svdquant(layer)[2], metadata, configs, infer_act_unsigned=infer)
    (stored,) = found.layers.values()
    assert stored.format.act_unsigned is unsigned
    assert bool(stored.notes) is unsigned


def nunchaku_file(folder):
    """A file of two layers, their parts and the bias of the first."""
    parts, bias, tensors = svdquant("net.to_out")
    quantization = json.dumps({"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}})
    rest = {"norm.weight": torch.ones(4), **awq("net.mod")[3]}
    save_file({**tensors, **rest}, folder / "in.safetensors", metadata={"quantization_config": quantization})
    return parts, bias, folder / "in.safetensors"


def test_a_file_becomes_one_of_comfyui(tmp_path):
    """Migrated, codes keep their bits, biases are in their natural order, and the old description is gone."""
    parts, bias, path = nunchaku_file(tmp_path)
    with open_source(path) as source:
        migrate(source, tmp_path / "out.safetensors", to="comfy")
    made = load_file(tmp_path / "out.safetensors")
    assert_same_bits(made["net.to_out.bias"], bias)
    assert_same_bits(made["net.to_out.weight"], parts["qdata"])
    assert_same_bits(made["net.mod.bias"], torch.arange(N).bfloat16())
    assert "net.to_out.comfy_quant" in made
    with open_source(tmp_path / "out.safetensors") as source:
        metadata = next(iter(source.files.values())).metadata
    assert "quantization_config" not in metadata


def test_a_file_is_decoded_and_loaded(tmp_path):
    """Decoded, and loaded into a module, weights are those of the parts and biases are in their natural order."""
    parts, bias, path = nunchaku_file(tmp_path)
    expected = parse_spec(f"svdquant_w4a4(rank={R})").dequantize(parts, (N, K), torch.bfloat16)
    with open_source(path) as source:
        dequantize(source, tmp_path / "plain.safetensors")
    made = load_file(tmp_path / "plain.safetensors")
    assert_same_bits(made["net.to_out.weight"], expected)
    assert_same_bits(made["net.to_out.bias"], bias)
    linear = torch.nn.Linear(K, N).to(torch.bfloat16)
    module = torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"to_out": linear})})
    lowbit.load(module, path, strict=False)
    assert_same_bits(linear.bias.detach(), bias)
    with lowbit.use_backend("eager"):  # kernels sum in other orders
        assert_same_bits(linear.weight.dequantize(), expected)


def test_frameworks_are_not_given_a_bias_in_the_order_of_a_kernel(tmp_path):
    """transformers and diffusers read plain tensors by themselves, so such files are refused there, with a way out."""
    path = nunchaku_file(tmp_path)[2]
    with pytest.raises(CheckpointError, match=r"'net.to_out.bias' lies in the order of a kernel.*migrate --to comfy"):
        describe_files([path])


def changed(name: str, tensor, layer: str = "a"):
    """The tensors of an SVDQuant layer of which one is another; None takes it out."""
    tensors = {**svdquant(layer)[2], f"{layer}.{name}": tensor}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed("wscales", torch.zeros(K // 16, N).to(torch.float8_e4m3fn)), "SVDQuant in nvfp4.*no format"),
        (changed("wtscale", torch.ones(1)), "SVDQuant in nvfp4"),
        (changed("proj_up", None), "lacks a.proj_up"),
        (changed("lora_up", torch.zeros(N, R)), "old and new names"),
        (changed("proj_down", torch.zeros(K, R + 1).bfloat16()), "rank 33"),
        (changed("proj_down", torch.zeros(K, 0).bfloat16()), "rank 0"),
        (changed("qweight", torch.zeros(100, K // 2, dtype=torch.int8)), "is 100 x 256"),
        (changed("qweight", torch.zeros(N, K // 8, dtype=torch.int32)), "expected int8"),
        (changed("smooth_factor", torch.ones(K - 64).bfloat16()), "smooth_factor is bfloat16"),
        (changed("proj_up", torch.zeros(N, R)), "proj_up is float32"),
        (changed("wzeros", torch.zeros(K // 64, N).bfloat16()), "expected int32"),
        ({**awq("a")[3], "a.wzeros": torch.zeros(3, N).bfloat16()}, "wzeros is bfloat16"),
        ({**awq("a")[3], "a.wscales": torch.zeros(3, N).bfloat16()}, r"expected \[4, 128\]"),
    ],
)
def test_other_layers_are_refused_by_name(tensors, message):
    """nvfp4, missing tensors, mixed names and wrong shapes are errors that name the layer."""
    with pytest.raises(CheckpointError, match=f"layer 'a'.*{message}"):
        find(tensors)
    assert [problem.layer for problem in find(tensors, strict=False).problems] == ["a"]


def test_offsets_that_float32_cannot_hold_are_refused():
    """An offset so far from its scale that their sum is rounded is an error, not a changed weight."""
    tensors = awq("a")[3]
    tensors["a.wzeros"][0, 0], tensors["a.wscales"][0, 0] = 1.0, 2.0**-40
    (layer,) = find(tensors).layers.values()
    with pytest.raises(PartsError, match="do not fit into float32"):
        DIALECT.load_parts(layer, tensors.__getitem__)
