"""Migrating changes the spelling of quantized layers and not one code or scale, forth and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PlanError
from tests.support.checkpoints import model_tensors, save_model, save_shards


def legacy_file(path, full_precision=False, prefix=""):
    """A `scaled_fp8` file as other tools write them: two layers, one with an input scale, and a plain one."""
    tensors = {prefix + "scaled_fp8": torch.zeros(2 if full_precision else 0).to(torch.float8_e4m3fn)}
    for i, layer in enumerate(("a", "b")):
        w = model_tensors()[f"blocks.{i}.up.weight"].float()
        scale = w.abs().max() / 448
        tensors[f"{prefix}{layer}.weight"] = (w / scale).to(torch.float8_e4m3fn)
        tensors[f"{prefix}{layer}.scale_weight"] = scale
    tensors[f"{prefix}a.scale_input"] = torch.tensor(0.25)
    tensors[f"{prefix}norm.weight"] = torch.ones(8)
    save_file(tensors, path, {"author": "x"})
    return tensors


def migrated(before, after, style):
    """Migrate one file to another."""
    with open_source(before) as source:
        return migrate(source, after, style)


def converted(tmp_path, spec):
    """The path of a small model in a format."""
    with open_source(save_model(tmp_path / "in.safetensors")) as source:
        convert(source, tmp_path / "out.safetensors", make_plan(source, spec, preset="none", solver="rtn"))
    return tmp_path / "out.safetensors"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("full_precision", [False, True])
def test_legacy_to_current_and_back(tmp_path, full_precision, prefix):
    """A legacy file becomes one with markers and a header, and comes back tensor for tensor."""
    old = legacy_file(tmp_path / "old.safetensors", full_precision, prefix)
    report = migrated(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "current")
    migrated(tmp_path / "new.safetensors", tmp_path / "back.safetensors", "legacy")
    new, back = load_file(tmp_path / "new.safetensors"), load_file(tmp_path / "back.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()

    assert new.keys() == {prefix + key for key in (
        "a.weight", "a.weight_scale", "a.input_scale", "a.comfy_quant", "b.weight", "b.weight_scale", "b.comfy_quant",
        "norm.weight")}  # fmt: skip
    assert same_bits(new[f"{prefix}a.weight"], old[f"{prefix}a.weight"])
    assert same_bits(new[f"{prefix}b.weight_scale"], old[f"{prefix}b.scale_weight"])
    marker = json.loads(bytes(new[f"{prefix}b.comfy_quant"].tolist()))
    assert marker["format"] == "float8_e4m3fn"
    assert marker.get("full_precision_matrix_mult", False) is full_precision
    assert json.loads(metadata["_quantization_metadata"])["layers"].keys() == {f"{prefix}a", f"{prefix}b"}
    assert metadata["author"] == "x"
    assert report.layers.keys() == {f"{prefix}a", f"{prefix}b"}
    assert back.keys() == old.keys()
    assert all(same_bits(back[key], old[key]) for key in old)


@pytest.mark.parametrize("spec", ["fp8_e4m3", "int8", "nvfp4", "mxfp8", "awq_w4a16", "svdquant_w4a4(rank=4)"])
def test_a_current_file_stays_as_it_is(tmp_path, spec):
    """Migrating a file that is current already changes no tensor and no description."""
    path = converted(tmp_path, spec)
    migrated(path, tmp_path / "again.safetensors", "current")
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")

    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    headers = []
    for name in (path, tmp_path / "again.safetensors"):
        with safe_open(name, "pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]


@pytest.mark.parametrize("spec", ["fp8_e4m3(granularity=row)", "int8", "nvfp4"])
def test_what_legacy_cannot_say_is_refused(tmp_path, spec):
    """A layer that the legacy spelling has no words for is an error with its name; nothing is written."""
    path = converted(tmp_path, spec)
    with pytest.raises(
        CheckpointError, match=r"layer '.*': is .*, and a scaled_fp8 file holds only fp8 with one scale"
    ):
        migrated(path, tmp_path / "old.safetensors", "legacy")
    assert not (tmp_path / "old.safetensors").exists()


def test_legacy_is_a_spelling_of_one_dialect(tmp_path):
    """From another one the way leads over comfy, and the error says so; it is none about unknown names."""
    with open_source(save_model(tmp_path / "in.safetensors")) as source:
        plan = make_plan(source, "fp8_e4m3", preset="none", solver="rtn", dialect="torchao")
        convert(source, tmp_path / "torchao.safetensors", plan)
    with pytest.raises(PlanError, match=r"torchao\.safetensors.* in the dialect torchao, .*to comfy first"):
        migrated(tmp_path / "torchao.safetensors", tmp_path / "old.safetensors", "legacy")
    migrated(tmp_path / "torchao.safetensors", tmp_path / "comfy.safetensors", "comfy")
    migrated(tmp_path / "comfy.safetensors", tmp_path / "old.safetensors", "legacy")


def test_a_dialect_of_folders_takes_no_file(tmp_path):
    """The way out is named without an option, which `migrate` and `convert` have under different names."""
    with pytest.raises(PlanError, match=r"needs a model folder .* or choose another dialect, such as comfy$"):
        migrated(converted(tmp_path, "int8(rotation=0)"), tmp_path / "gptq.safetensors", "gptq")


def test_mixed_float8_dtypes_are_refused_for_legacy(tmp_path):
    """A legacy file says its float8 dtype once, so two of them cannot be said."""
    with open_source(save_model(tmp_path / "in.safetensors")) as source:
        plan = make_plan(source, "fp8_e4m3", preset="none", layer_rules=[("up", "fp8_e5m2")])
        convert(source, tmp_path / "out.safetensors", plan)
    with pytest.raises(CheckpointError, match=r"differ in format .*, which a scaled_fp8 file states once for all"):
        migrated(tmp_path / "out.safetensors", tmp_path / "old.safetensors", "legacy")


def test_a_plain_file_and_an_unknown_style_are_refused(tmp_path):
    """There must be something to migrate, and a known style to migrate to."""
    path = save_model(tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match="holds no quantized layer"):
        migrated(path, tmp_path / "out.safetensors", "current")
    with pytest.raises(CheckpointError, match="unknown convention 'newest' to migrate to; known are current, legacy"):
        migrated(path, tmp_path / "out.safetensors", "newest")


def test_shards_stay_shards(tmp_path):
    """Each shard describes its own layers, and the marker of a legacy set stands once; the way back is exact."""
    with open_source(save_shards(tmp_path / "in")) as source:
        convert(source, tmp_path / "new", make_plan(source, "fp8_e4m3", preset="none"))
    migrated(tmp_path / "new", tmp_path / "old", "legacy")
    report = migrated(tmp_path / "old", tmp_path / "back", "current")

    def markers(folder):
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))
                keys = list(file.keys())
            marked = [key.removesuffix(".comfy_quant") for key in keys if key.endswith(".comfy_quant")]
            found[path.name] = (sorted(header["layers"]), sorted(marked), keys.count("scaled_fp8"))
        return found

    assert sum(count for _, _, count in markers(tmp_path / "old").values()) == 1
    assert all(header == marked == [] for header, marked, _ in markers(tmp_path / "old").values())
    assert markers(tmp_path / "back") == markers(tmp_path / "new")
    assert all(header == marked for header, marked, _ in markers(tmp_path / "back").values())
    assert sum(len(header) for header, _, _ in markers(tmp_path / "back").values()) == len(report.layers) > 1
    for path in (tmp_path / "new").glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "back" / path.name)
        assert before.keys() == after.keys()
        assert all(same_bits(before[key], after[key]) for key in before if not key.endswith(".comfy_quant"))


def test_an_input_scale_of_one_is_not_lost(tmp_path):
    """A legacy file takes an input scale of exactly 1 for none, so a layer that has one is refused."""
    legacy_file(tmp_path / "old.safetensors")
    migrated(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "current")
    tensors = load_file(tmp_path / "new.safetensors")
    save_file({**tensors, "a.input_scale": torch.tensor(1.0)}, tmp_path / "one.safetensors")

    with pytest.raises(CheckpointError, match="layer 'a': its input_scale does not come back"):
        migrated(tmp_path / "one.safetensors", tmp_path / "back.safetensors", "legacy")
    assert not (tmp_path / "back.safetensors").exists()


def test_a_quantized_table_in_a_folder_of_linears_is_told(tmp_path):
    """Programs that read compressed-tensors look codes up as values: a migrated table of embeddings is named."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    names = ("embeddings.word_embeddings", "encoder.layer.0.attention.self.query")
    save_file({f"{name}.weight": torch.randn(128, 128) for name in names}, tmp_path / "in" / "model.safetensors")
    with open_source(tmp_path / "in") as source:
        convert(source, tmp_path / "comfy", make_plan(source, "int8(rotation=0)"))
    with open_source(tmp_path / "comfy") as source:
        told = [migrate(source, tmp_path / to, to).notes for to in ("compressed_tensors", "torchao")]

    about = [note for note in told[0] if "embedding" in note]
    assert len(about) == 1
    assert about[0].startswith("embeddings.word_embeddings: is a quantized embedding table, which programs that read ")
    assert not [note for note in told[1] if "embedding" in note]


@pytest.mark.parametrize(
    ("spec", "to", "held"),
    [
        ("int8(rotation=16)", "compressed_tensors", "int8(rotation=0)"),
        ("int8(rotation=16)", "torchao", "int8(rotation=0)"),
        ("int8(rotation=16,activations=none)", "torchao", "int8(activations=none,rotation=0)"),
        ("int8(rotation=16)", "gptq", None),
        ("convrot_w4a4(rotation=16)", "compressed_tensors", None),
    ],
)
def test_what_holds_no_rotation_says_what_it_holds(tmp_path, spec, to, held):
    """A rotated layer that a dialect refuses: the format to convert the 16-bit file to, where it has a place for it."""
    (tmp_path / "in").mkdir()
    save_model(tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    with open_source(tmp_path / "in") as source:
        convert(source, tmp_path / "comfy", make_plan(source, spec, preset="none", solver="rtn"))

    with pytest.raises(CheckpointError, match="its codes cannot be kept") as refused:
        migrated(tmp_path / "comfy", tmp_path / "other", to)

    told = f"; better the 16-bit file with --format '{held}', which {to} can hold"
    assert str(refused.value).endswith(told) if held else "better" not in str(refused.value)
    if held:
        with open_source(tmp_path / "in") as source:
            convert(source, tmp_path / "plain", make_plan(source, held, preset="none"))
        migrated(tmp_path / "plain", tmp_path / "other", to)


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_a_row_that_is_one_group_goes_with_groups(tmp_path, to):
    """torchao's files do not tell a group of all 128 columns from a row; other layers have groups of 128."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"torch_dtype": "float16"}')
    weights = {f"{name}.weight": torch.randn(64, k).half() for name, k in (("down", 256), ("up", 128))}
    save_file(weights, tmp_path / "in" / "model.safetensors")
    spec = "wna16(group_size=128,zero_point=true)"
    with open_source(tmp_path / "in") as source:
        convert(source, tmp_path / "torchao", make_plan(source, spec, preset="none", dialect="torchao"))
    migrated(tmp_path / "torchao", tmp_path / "out", to)

    decoded = []
    for name in ("torchao", "out"):
        with open_source(tmp_path / name) as source:
            held = look_for_layers(source, source.components[0])
            decoded.append({layer: held.dequantized(held.layers[layer], torch.float32)[0] for layer in ("down", "up")})
            formats = {stored.format.spec for stored in held.layers.values()}
    assert formats == {"wna16(zero_point=True)"}
    assert all(torch.equal(decoded[0][layer], decoded[1][layer]) for layer in ("down", "up"))
