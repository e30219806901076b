"""Folders of diffusers' nunchaku_lite as lowbit writes them: read back bit for bit, described as diffusers wants it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dialects import StoredLayer, get_dialect
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.cli import app
from lowbit.errors import PartsError, PlanError
from lowbit.formats import parse_spec
from lowbit.layouts import nunchaku_tiles as tiles
from lowbit.lora import bake_checkpoint
from lowbit.solvers import Statistics
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.support import gaussian

DIALECT = get_dialect("nunchaku")
SPEC = "svdquant_w4a4(rank=16)"
AWQ = "awq_w4a16(wzeros=bfloat16)"
N, K = 256, 128


def model_folder(folder, dtype=torch.bfloat16):
    """A model folder of three linears, two of them with a bias, and a norm."""
    folder.mkdir()
    tensors = {
        "blocks.0.attn.to_q.weight": gaussian(N, K, seed=1),
        "blocks.0.attn.to_q.bias": torch.linspace(-1, 1, N),
        "blocks.0.ff.net.2.weight": gaussian(K, N, seed=2),
        "blocks.0.mod.1.weight": gaussian(N, K, seed=3),
        "blocks.0.mod.1.bias": torch.linspace(-2, 2, N),
        "norm.weight": torch.ones(K),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "Any", "hidden": K}))
    return tensors


def planned(source, spec=SPEC, **options):
    """A plan in which the modulation is AWQ."""
    rules = options.pop("layer_rules", [("mod", "awq_w4a16")])
    return make_plan(source, spec, preset="none", dialect="nunchaku", layer_rules=rules, **options)


def held_layers(folder):
    """Format and parts of each layer of a folder, and its plain tensors in their natural order."""
    with open_source(folder) as source:
        held = look_for_layers(source, source.components[0])
        layers = {name: (stored.format, held.load(stored)) for name, stored in held.layers.items()}
        return layers, {key: held.read(key) for key in held.found.plain}


@pytest.fixture
def converted(tmp_path):
    """A model folder, and the same converted."""
    tensors = model_folder(tmp_path / "in")
    with open_source(tmp_path / "in") as source:
        convert(source, tmp_path / "out", planned(source), jobs=1)
    return tensors, tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_folder_is_converted_and_read_back(tmp_path, dtype):
    """Parts are those of a conversion to comfy, bit for bit; biases come back in their natural order."""
    tensors = model_folder(tmp_path / "in", dtype)
    half = "float16" if dtype == torch.float16 else "bfloat16"
    rules = [("mod", f"awq_w4a16(wzeros={half})")]
    with open_source(tmp_path / "in") as source:
        convert(source, tmp_path / "out", planned(source), jobs=1)
        convert(source, tmp_path / "comfy", make_plan(source, SPEC, preset="none", layer_rules=rules), jobs=1)
    layers, plain = held_layers(tmp_path / "out")
    expected = held_layers(tmp_path / "comfy")[0]

    for name in ("blocks.0.attn.to_q", "blocks.0.ff.net.2", "blocks.0.mod.1"):
        fmt = parse_spec(f"awq_w4a16(wzeros={half})" if "mod" in name else SPEC)
        assert layers[name][0] == fmt
        for part, value in expected[name][1].items():
            assert_same_bits(layers[name][1][part], value)
    assert sorted(plain) == ["blocks.0.attn.to_q.bias", "blocks.0.mod.1.bias", "norm.weight"]
    for name, value in plain.items():
        assert_same_bits(value, tensors[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["compute_dtype"] == half
    assert config["hidden"] == K


def test_what_is_in_the_file_is_in_the_order_of_the_kernels(converted):
    """Names, dtypes and shapes are nunchaku_lite's, and the bias of an SVDQuant layer lies in tiles, AWQ's does not."""
    tensors, folder = converted
    made = load_file(folder / "model.safetensors")
    shapes = {name.removeprefix("blocks.0."): (value.dtype, tuple(value.shape)) for name, value in made.items()}
    half = torch.bfloat16

    assert shapes == {
        "attn.to_q.qweight": (torch.int8, (N, K // 2)),
        "attn.to_q.wscales": (half, (K // 64, N)),
        "attn.to_q.smooth_factor": (half, (K,)),
        "attn.to_q.proj_down": (half, (K, 16)),
        "attn.to_q.proj_up": (half, (N, 16)),
        "attn.to_q.bias": (half, (N,)),
        "ff.net.2.qweight": (torch.int8, (K, N // 2)),
        "ff.net.2.wscales": (half, (N // 64, K)),
        "ff.net.2.smooth_factor": (half, (N,)),
        "ff.net.2.proj_down": (half, (N, 16)),
        "ff.net.2.proj_up": (half, (K, 16)),
        "mod.1.qweight": (torch.int32, (N // 4, K // 2)),
        "mod.1.wscales": (half, (K // 64, N)),
        "mod.1.wzeros": (half, (K // 64, N)),
        "mod.1.bias": (half, (N,)),
        "norm.weight": (half, (K,)),
    }
    stored, bias = made["blocks.0.attn.to_q.bias"], tensors["blocks.0.attn.to_q.bias"]
    assert not torch.equal(stored, bias)
    assert_same_bits(stored[tiles.channel_places(N)], bias)
    assert_same_bits(made["blocks.0.mod.1.bias"], tensors["blocks.0.mod.1.bias"])


def test_the_description_is_that_of_diffusers(converted):
    """quantization_config has the fields that diffusers asks for, and its own class takes it as it is."""
    config = json.loads((converted[1] / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": {
            "precision": "int4",
            "group_size": 64,
            "rank": 16,
            "targets": ["blocks.0.attn.to_q", "blocks.0.ff.net.2"],
        },
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": ["blocks.0.mod.1"]},
    }
    quantizers = pytest.importorskip("diffusers.quantizers.quantization_config")
    if not hasattr(quantizers, "NunchakuLiteQuantizationConfig"):
        pytest.skip("a diffusers without nunchaku_lite")
    taken = quantizers.NunchakuLiteQuantizationConfig.from_dict(dict(config))
    assert taken.compute_dtype == torch.bfloat16
    assert taken.to_dict().items() >= config.items()


@pytest.mark.parametrize("spec", [SPEC, AWQ])
def test_random_codes_come_back(spec):
    """Any codes, scales and factors that the tensors can hold come back with the same bits."""
    fmt, generator = parse_spec(spec), torch.Generator().manual_seed(0)
    parts = fmt.quantize(gaussian(N, K, dtype=torch.bfloat16))
    parts["qdata"] = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8, generator=generator)
    for name in parts.keys() - {"qdata", "zero"}:
        value = torch.randn(parts[name].shape, generator=generator).bfloat16()
        parts[name] = value.to(parts[name].dtype)
    if "zero" in parts:
        low = torch.randn(parts["zero"].shape, generator=generator).bfloat16().float()
        parts["zero"] = low + 8 * parts["scale"]
    stored = StoredLayer("a", fmt, (N, K))
    tensors = DIALECT.store_parts(stored, parts)
    keys = dict(stored.keys)
    roles = {"qweight": "qdata", "wscales": "scale", "wzeros": "zero"}
    keys.update({roles.get(key[2:], key[2:]): key for key in tensors})
    back = DIALECT.load_parts(replace(stored, keys=keys), tensors.__getitem__)
    for name, value in parts.items():
        assert_same_bits(back[name], value)


def test_a_file_of_comfyui_becomes_a_folder_and_comes_back(converted, tmp_path):
    """Migrated to comfy and back, the folder has the same tensors and the same description."""
    folder = converted[1]
    with open_source(folder) as source:
        migrate(source, tmp_path / "comfy", to="comfy")
    comfy, _ = held_layers(tmp_path / "comfy")
    assert comfy["blocks.0.mod.1"][0] == parse_spec("awq_w4a16")
    assert (
        json.loads((tmp_path / "comfy" / "config.json").read_text())["quantization_config"]["quant_method"] == "lowbit"
    )
    with open_source(tmp_path / "comfy") as source:
        migrate(source, tmp_path / "again", to="nunchaku")
    first, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert_same_bits(again[name], value)
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_a_module_loads_it(converted):
    """A module that loads the folder has the weights that the parts mean and biases in their natural order."""
    tensors, folder = converted
    names = ("attn.to_q", "ff.net.2", "mod.1")
    linears = {
        name: torch.nn.Linear(*reversed(tensors[f"blocks.0.{name}.weight"].shape), bias="ff" not in name)
        for name in names
    }
    module = torch.nn.Module()
    block = module.get_submodule("")
    for path in ("blocks", "blocks.0", "blocks.0.attn", "blocks.0.ff", "blocks.0.ff.net", "blocks.0.mod"):
        parent, _, last = path.rpartition(".")
        module.get_submodule(parent).add_module(last, torch.nn.Module())
    for name, linear in linears.items():
        parent, _, last = f"blocks.0.{name}".rpartition(".")
        block.get_submodule(parent).add_module(last, linear.bfloat16())
    lowbit.load(module, folder, strict=False)
    layers, _ = held_layers(folder)
    for name, linear in linears.items():
        fmt, parts = layers[f"blocks.0.{name}"]
        wanted = fmt.dequantize(parts, tuple(linear.weight.shape), torch.bfloat16)
        with lowbit.use_backend("eager"):  # kernels sum in other orders
            assert_same_bits(linear.weight.dequantize(), wanted)
        if linear.bias is not None:
            assert_same_bits(linear.bias.detach(), tensors[f"blocks.0.{name}.bias"])


def test_a_lora_is_baked_in_and_the_bias_stays_in_its_order(converted, tmp_path):
    """A baked folder is read with its biases as they were, those of changed and of other layers."""
    tensors, folder = converted
    down, up = gaussian(4, N, seed=8).bfloat16(), gaussian(K, 4, seed=9).bfloat16()
    adapter = {"blocks.0.ff.net.2.lora_A.weight": down, "blocks.0.ff.net.2.lora_B.weight": up}
    save_file(adapter, tmp_path / "lora.safetensors")
    with pytest.raises(PartsError, match="one rank for all layers"):  # the LoRA would make one rank larger
        bake_checkpoint(folder, tmp_path / "baked", tmp_path / "lora.safetensors")
    bake_checkpoint(folder, tmp_path / "baked", tmp_path / "lora.safetensors", rounding="error_feedback")
    layers, plain = held_layers(tmp_path / "baked")
    assert_same_bits(plain["blocks.0.attn.to_q.bias"], tensors["blocks.0.attn.to_q.bias"])
    fmt, parts = layers["blocks.0.ff.net.2"]
    wanted = tensors["blocks.0.ff.net.2.weight"].float() + up.float() @ down.float()
    made = fmt.dequantize(parts, (K, N), torch.float32)
    assert float((made - wanted).norm() / wanted.norm()) < 0.2
    one, two = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "baked"))
    assert one == two


def test_signed_activations_are_kept_where_unsigned_ones_would_fit(tmp_path):
    """An input that is never negative does not make a layer unsigned here, and the plan says why."""
    model_folder(tmp_path / "in")
    x = torch.rand(512, N, generator=torch.Generator().manual_seed(0))
    known = Statistics(hessian=x.t() @ x / len(x), tokens=len(x), minimum=x.amin(0), samples=x[:64])
    with open_source(tmp_path / "in") as source:
        plan = planned(source, statistics=InMemory({"blocks.0.ff.net.2": known}))
    (layer,) = [tensor for tensor in plan.tensors() if tensor.layer == "blocks.0.ff.net.2"]
    assert layer.format == SPEC
    assert "the dialect nunchaku has no place for svdquant_w4a4(rank=16,act_unsigned=True)" in layer.why


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (
            StoredLayer("a", parse_spec("svdquant_w4a4(rank=16)"), (192, 128)),
            "192 x 128 of rank 16.*whole tiles of 128",
        ),
        (StoredLayer("a", parse_spec("svdquant_w4a4(rank=16)"), (128, 192)), "128 x 192 of rank 16"),
        (StoredLayer("a", parse_spec("svdquant_w4a4(rank=24)"), (128, 128)), "rank 24.*multiple of 16"),
        (StoredLayer("a", parse_spec("svdquant_w4a4(rank=16,act_unsigned=true)"), (128, 128)), "signed codes"),
        (
            StoredLayer("a", parse_spec("svdquant_w4a4(rank=16)"), (128, 128), dtypes={"scale": torch.float32}),
            "one dtype of 16 bits, and these are bfloat16, float32",
        ),
        (
            StoredLayer("a", parse_spec("svdquant_w4a4(rank=16,input_scale=true)"), (128, 128)),
            "no place for a pre_quant",
        ),
        (StoredLayer("a", parse_spec("awq_w4a16(group_size=128)"), (128, 128)), "groups of 64, and this has 128"),
        (StoredLayer("a", parse_spec("awq_w4a16"), (128, 128)), r"use awq_w4a16\(wzeros=bfloat16\)"),
        (StoredLayer("a", parse_spec(AWQ), (128, 128), torch.float16), r"use awq_w4a16\(wzeros=float16\)"),
        (StoredLayer("a", parse_spec(AWQ), (12, 128)), "12 x 128.*multiples of 8 rows"),
        (StoredLayer("a", parse_spec("nvfp4"), (128, 128)), "svdquant_w4a4 and awq_w4a16, nothing else"),
    ],
)
def test_what_the_runtime_cannot_take_is_refused(stored, why):
    """Shapes, ranks, groups, dtypes and formats without a place are refused in words, with the layer's name."""
    with pytest.raises(PartsError, match=f"layer 'a': is .*{why}"):
        DIALECT.stored_specs(stored)


def test_a_conversion_names_the_layer_that_does_not_fit(tmp_path):
    """A layer of no whole tiles is an error before anything is written, by name and with a way out."""
    model_folder(tmp_path / "in")
    with open_source(tmp_path / "in") as source, pytest.raises(PlanError, match=r"'blocks.0.attn.to_q' as .*rank 24"):
        planned(source, "svdquant_w4a4(rank=24)")


def test_layers_of_two_ranks_are_refused(tmp_path):
    """nunchaku_lite has one rank for all layers, so two of them are an error that names both layers."""
    model_folder(tmp_path / "in")
    rules = [("to_q", "svdquant_w4a4(rank=32)"), ("mod", "awq_w4a16")]
    with open_source(tmp_path / "in") as source:
        plan = planned(source, layer_rules=rules)
        with pytest.raises(PartsError, match=r"one rank for all layers, and 'blocks.0.attn.to_q' has 32, 'blocks.0.ff"):
            convert(source, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_offsets_of_other_files_that_16_bits_do_not_hold_are_refused():
    """An AWQ layer whose wzeros are no 16-bit floats cannot keep its codes: an error that says to convert again."""
    stored, plain = StoredLayer("a", parse_spec(AWQ), (128, 128)), parse_spec("awq_w4a16")
    parts = plain.recast(plain.quantize(gaussian(128, 128)), stored.format)
    with pytest.raises(PartsError, match=r"layer 'a': its wzeros do not fit into bfloat16.*convert the 16-bit"):
        DIALECT.store_parts(stored, parts)


def test_the_command_writes_it(tmp_path):
    """`lowbit convert --dialect nunchaku` on a folder writes one, and a single file is refused with the way out."""
    model_folder(tmp_path / "in")
    rule = ["--layer", "mod=awq_w4a16", "--preset", "none", "--dialect", "nunchaku", "--format", SPEC]
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *rule])
    assert done.exit_code == 0, done.output
    assert set(held_layers(tmp_path / "out")[0]) == {"blocks.0.attn.to_q", "blocks.0.ff.net.2", "blocks.0.mod.1"}
    checked = CliRunner().invoke(app, ["verify", str(tmp_path / "in"), str(tmp_path / "out")])
    assert checked.exit_code == 0, checked.output
    single = str(tmp_path / "in" / "model.safetensors")
    refused = CliRunner().invoke(app, ["convert", single, "-o", str(tmp_path / "x.safetensors"), *rule])
    assert refused.exit_code != 0
    assert "needs a model folder" in refused.output.replace("\n", " ")
