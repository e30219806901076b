"""`lowbit lora` and `lowbit export`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import tiny_model

NAMES = {"transformer.blocks.0.attn.q": (64, 64), "transformer.blocks.1.mlp.up": (128, 64)}


@pytest.fixture
def adapter(tmp_path):
    """A LoRA file of rank 4 on two layers, as diffusers names them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (n, k) in NAMES.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, k, generator=generator) * 0.05
        tensors[f"{name}.lora_B.weight"] = torch.randn(n, 4, generator=generator) * 0.05
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_an_adapter_is_shown_with_its_places(lowbit, tmp_path, adapter):
    """Layers, ranks and where they are in a checkpoint, as a table and as JSON."""
    model = tiny_model(tmp_path / "m.safetensors")
    done = lowbit("lora", "inspect", adapter, "--for", model, "--json")
    assert done.code == 0
    assert {row["layer"]: row["in"] for row in done.json["layers"]} == {
        name: name.removeprefix("transformer.") for name in NAMES
    }
    assert {row["rank"] for row in done.json["layers"]} == {4}
    shown = lowbit("lora", "inspect", adapter)
    assert "changes 2 layers" in shown.out


def test_a_lora_is_baked_into_a_quantized_file(lowbit, tmp_path, adapter):
    """The changed layers stay in their format, the change is in them, and nothing else differs."""
    model = tiny_model(tmp_path / "m.safetensors")
    assert lowbit("convert", model, "-o", tmp_path / "q.safetensors", "-f", "int8").code == 0
    done = lowbit("lora", "bake", tmp_path / "q.safetensors", adapter, "-o", tmp_path / "b.safetensors", "--json")
    assert done.code == 0, done.err
    assert len(done.json["layers"]) == 2
    assert all(0.9 < layer["recovered"] < 1.1 for layer in done.json["layers"].values())
    before, after = load_file(tmp_path / "q.safetensors"), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    differ = {key for key in before if not torch.equal(before[key], after[key])}
    assert differ
    assert all(key.startswith(("blocks.0.attn.q", "blocks.1.mlp.up")) for key in differ)


def test_wrong_adapters_and_options_of_lora_end_with_their_codes(lowbit, tmp_path, adapter):
    """An unknown rounding is a wrong option, a LoRA of another model bad input; nothing is written."""
    model, out = tiny_model(tmp_path / "m.safetensors"), tmp_path / "b.safetensors"
    done = lowbit("lora", "bake", model, adapter, "-o", out, "--rounding", "hope")
    assert (done.code, out.exists()) == (2, False)
    assert "error_feedback" in done.err
    done = lowbit("lora", "bake", model, adapter, "-o", out, "--strength", "nan")
    assert (done.code, out.exists()) == (2, False)
    assert "no finite number" in done.err
    save_file({"other.lora_A.weight": torch.ones(2, 8), "other.lora_B.weight": torch.ones(8, 2)}, adapter)
    done = lowbit("lora", "bake", model, adapter, "-o", out)
    assert (done.code, out.exists()) == (3, False)
    assert "is a layer of the model" in done.err


def test_a_checkpoint_is_exported_and_read_again(lowbit, tmp_path):
    """A GGUF file is written, inspected like any checkpoint, and converted back."""
    pytest.importorskip("gguf")
    model = tiny_model(tmp_path / "m.safetensors")
    done = lowbit("export", model, "-o", tmp_path / "m.gguf", "--type", "Q8_0", "--json")
    assert done.code == 0, done.err
    assert set(done.json["types"].values()) >= {"Q8_0", "F32"}
    found = lowbit("inspect", tmp_path / "m.gguf", "--json")
    assert found.code == 0, found.err
    assert any(group["format"].startswith("gguf") for group in found.json["groups"])
    assert lowbit("dequantize", tmp_path / "m.gguf", "-o", tmp_path / "back.safetensors").code == 0
    back, plain = load_file(tmp_path / "back.safetensors"), load_file(model)
    w = plain["blocks.0.mlp.up.weight"].float()
    assert (back["blocks.0.mlp.up.weight"].float() - w).norm() < 0.02 * w.norm()


def test_export_says_what_is_kept_and_what_is_missing(lowbit, tmp_path):
    """The preset's layers with their reasons, as `convert` says them, and a warning on stderr and in the JSON."""
    pytest.importorskip("gguf")
    weights = {name: torch.randn(64, 64) for name in ("img_in", "final_layer.linear", "blocks.0.up", "blocks.1.up")}
    model = tmp_path / "m.safetensors"
    save_file({f"{name}.weight": weight.bfloat16() for name, weight in weights.items()}, model)
    planned = lowbit("plan", model, "-f", "gguf(type=Q8_0)")
    done = lowbit("export", model, "-o", tmp_path / "m.gguf")
    assert done.code == 0, done.err
    said = "preset generic: no model family is recognized by the names of the tensors"
    assert said in done.out
    assert said in planned.out
    assert "It looks like the way into the model" in done.out
    assert "2 Q8_0, 2 BF16" in done.out
    assert "no general.architecture is written" in done.err
    done = lowbit("export", model, "-o", tmp_path / "m.gguf", "--preset", "none", "--json")
    assert done.json["kept"] == {}
    assert "--architecture NAME" in done.json["warnings"][0]
    assert set(done.json["types"].values()) == {"Q8_0"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--preset", "fluks"), "fluks"),
        (("--preset", "none", "--type", "F16"), "--type F16 quantizes nothing"),
        (("--preset", "none", "--plan", "plan.json"), "is said by the plan file already"),
    ],
)
def test_a_preset_that_changes_nothing_is_a_wrong_option(lowbit, tmp_path, options, said):
    """An unknown one, and one beside a type or plan that leaves it no say."""
    done = lowbit("export", tiny_model(tmp_path / "m.safetensors"), "-o", tmp_path / "m.gguf", *options)
    assert (done.code, (tmp_path / "m.gguf").exists()) == (2, False)
    assert said in done.err


def test_verify_does_not_say_that_a_file_of_other_names_is_plain(lowbit, tmp_path):
    """Quantized layers under names that the source does not have are counted."""
    pytest.importorskip("gguf")
    model = tiny_model(tmp_path / "m.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in load_file(model).items()}, tmp_path / "o.safetensors")
    assert lowbit("export", tmp_path / "o.safetensors", "-o", tmp_path / "o.gguf").code == 0
    done = lowbit("verify", model, tmp_path / "o.gguf")
    assert done.code == 1
    assert done.out.count("problem: ") == 1
    assert "quantized layers of OUT not compared: SRC has none of their names" in done.out
    assert "nothing in OUT is quantized" not in done.out


def test_an_unknown_type_is_a_wrong_option(lowbit, tmp_path):
    """The types that can be written are named."""
    model = tiny_model(tmp_path / "m.safetensors")
    done = lowbit("export", model, "-o", tmp_path / "m.gguf", "--type", "IQ4_XS")
    assert done.code == 2
    assert "Q8_0" in done.err


def test_no_safetensors_file_gets_the_name_of_a_gguf_file(lowbit, tmp_path):
    """`convert` to a .gguf path is refused with the command that writes one."""
    model = tiny_model(tmp_path / "m.safetensors")
    done = lowbit("convert", model, "-o", tmp_path / "m.gguf", "-f", "int8")
    assert (done.code, (tmp_path / "m.gguf").exists()) == (4, False)
    assert "lowbit export" in done.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("convert", "-f", "gguf(type=NVFP4,global_scale=true)", "-o"), "nvfp4"),
        (("convert", "-f", "int8", "--dialect", "bfl", "-o"), "compressed_tensors"),
        (("dequantize", "--source-dialect", "nope", "-o"), "bfl_swapped"),
    ],
)
def test_what_cannot_be_written_or_read_is_a_wrong_option(lowbit, tmp_path, arguments, names):
    """A format or dialect that is only read, and an unknown one, end with 2 before anything is opened."""
    command, *options = arguments
    done = lowbit(command, tmp_path / "absent.safetensors", *options, tmp_path / "out.safetensors")
    assert done.code == 2
    assert names in done.err
