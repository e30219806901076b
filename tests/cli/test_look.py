"""`lowbit inspect`, `verify`, `dequantize`, `migrate`, `formats` and `doctor`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.formats import formats


def test_inspect_folds_blocks_and_tells_what_is_stored(lowbit, quantized):
    """One line a group of layers, with format, stored tensors and bits a weight."""
    done = lowbit("inspect", quantized)

    assert done.code == 0
    assert "blocks.*.attn.q" in done.out
    assert "qdata float8_e4m3fn [64, 64]" in done.out
    assert "written as comfy" in done.out
    assert "no problems" in done.out


def test_inspect_as_json_counts_every_layer(lowbit, quantized):
    """The groups add up to the layers and the bytes of the file."""
    found = lowbit("inspect", quantized, "--json").json

    coded = [group for group in found["groups"] if group["format"]]
    assert sum(group["count"] for group in coded) == 6
    assert {group["format"] for group in coded} == {"fp8_e4m3"}
    assert sum(group["bytes"] for group in found["groups"]) == found["bytes"]
    assert found["problems"] == []


def test_inspect_of_a_plain_file_is_fine(lowbit, model):
    """A file without quantized layers is no problem."""
    done = lowbit("inspect", model)

    assert done.code == 0
    assert "not quantized" in done.out


def damage_nan(tensors):
    """A scale that is NaN."""
    tensors["blocks.0.attn.q.weight_scale"].fill_(float("nan"))


def damage_marker(tensors):
    """A marker that is no JSON."""
    tensors["blocks.0.attn.q.comfy_quant"] = torch.tensor(list(b"{oops"), dtype=torch.uint8)


def damage_scale(tensors):
    """A scale that is missing."""
    del tensors["blocks.0.attn.q.weight_scale"]


@pytest.mark.parametrize("damage", [damage_nan, damage_marker, damage_scale])
def test_inspect_ends_with_1_and_names_the_layer_with_a_problem(lowbit, quantized, damage):
    """Damage is a finding: the other layers are still listed."""
    tensors = load_file(quantized)
    damage(tensors)
    save_file(tensors, quantized)

    text, data = lowbit("inspect", quantized), lowbit("inspect", quantized, "--json")

    assert (text.code, data.code) == (1, 1)
    assert "problem: " in text.out
    assert any("blocks.0.attn.q" in problem for problem in data.json["problems"])
    assert "blocks.*.mlp.up" in text.out


def test_inspect_says_once_what_holds_for_many_layers(lowbit, tmp_path):
    """A file of hundreds of layers with an older marker gives one line, not hundreds; JSON names them all."""
    marker = torch.frombuffer(bytearray(b'{"convrot": false, "per_row": true}'), dtype=torch.uint8)
    codes = torch.zeros(8, 64, dtype=torch.int8)
    tensors = {}
    for i in range(5):
        layer = {"weight": codes, "weight_scale": torch.ones(8, 1), "comfy_quant": marker}
        tensors |= {f"blocks.{i}.q.{name}": tensor.clone() for name, tensor in layer.items()}
    save_file(tensors, tmp_path / "old.safetensors")

    text = lowbit("inspect", tmp_path / "old.safetensors").out
    data = lowbit("inspect", tmp_path / "old.safetensors", "--json").json

    lines = [line for line in text.splitlines() if line.startswith("note: ")]
    assert len(data["notes"]) == 5
    assert len(lines) == 1
    assert lines[0].startswith("note: blocks.0.q and 4 more: the marker names no format (INT8-Fast)")


def test_inspect_says_what_floats_of_8_bits_without_a_scale_are(lowbit, tmp_path):
    """They are plain values, which is no problem, but nobody should take them for quantized ones."""
    path = tmp_path / "bare.safetensors"
    tensors = {f"{name}.weight": torch.ones(64, 64).to(torch.float8_e4m3fn) for name in "abc"}
    save_file({**tensors, "c.scale": torch.ones(1)}, path)

    done = lowbit("inspect", path, "--json")

    assert done.code == 0
    assert done.json["notes"] == [
        (
            "'a.weight' and 1 more: 8-bit floats without a scale; they are read as plain values, whatever made them "
            "(lowbit dequantize writes them in 16 bits)"
        ),
        "'c.weight': 8-bit floats, and how 'c.scale' scales them is not known; take the 16-bit file",
    ]


def test_inspect_finds_quantized_weights_that_nothing_describes(lowbit, tmp_path):
    """Codes beside a scale without a marker are a problem, not a plain file."""
    path = tmp_path / "strange.safetensors"
    save_file({"a.weight": torch.zeros(8, 8, dtype=torch.int8), "a.weight_scale": torch.ones(8, 1)}, path)

    done = lowbit("inspect", path)

    assert done.code == 1
    assert "nothing says how they are stored" in done.out


def test_verify_lists_the_worst_layers_first(lowbit, model, quantized):
    """The layers come in rising order of SQNR and everything else is identical."""
    done = lowbit("verify", model, quantized, "--min-sqnr", "30")

    levels = [float(line.split(" dB")[0].split()[-1]) for line in done.out.splitlines() if "fp8_e4m3" in line]
    assert done.code == 0
    assert len(levels) == 6
    assert levels == sorted(levels)
    assert "9 other tensors identical" in done.out
    assert "all layers reach 30 dB" in done.out


def test_verify_takes_a_number_for_a_threshold(lowbit, model, quantized):
    """NaN, which no layer reaches, is a wrong option and no bad checkpoint."""
    done = lowbit("verify", model, quantized, "--min-sqnr", "nan", "--json")

    assert (done.code, done.json["exit_code"]) == (2, 2)
    assert "write a number of dB" in done.err


def test_verify_ends_with_1_below_the_threshold(lowbit, model, quantized):
    """In text and in JSON, which names the failing layers."""
    text = lowbit("verify", model, quantized, "--min-sqnr", "60")
    data = lowbit("verify", model, quantized, "--min-sqnr", "60", "--json")

    assert (text.code, data.code) == (1, 1)
    assert "6 layers below 60 dB" in text.out
    assert len(data.json["failing"]) == 6
    assert data.json["passed"] is False


def test_verify_of_files_that_do_not_belong_together_shows_some_of_each_kind(lowbit, model, tmp_path):
    """Every tensor but one is a problem then, and the screen is not filled with them; JSON names all."""
    other, norm = tmp_path / "other.safetensors", {"norm.weight": torch.ones(64)}
    save_file({f"layer.{i}.weight": torch.randn(64, 64).bfloat16() for i in range(8)} | norm, model)
    save_file({f"block.{i}.weight": torch.randn(64, 64).bfloat16() for i in range(9)} | norm, other)
    out = tmp_path / "int8.safetensors"
    assert lowbit("convert", other, "-o", out, "--format", "int8").code == 0

    text, data = lowbit("verify", model, out), lowbit("verify", model, out, "--json").json

    assert text.code == 1
    assert text.out.count("of the source is missing") == 5
    assert "problem: ... and 3 more of this kind; --json names all" in text.out
    assert text.out.count("is not in the source") == 5
    assert "problem: ... and 4 more of this kind; --json names all" in text.out
    assert len(data["problems"]) == 17
    assert "no quantized layer of OUT is in SRC" in text.out


def test_verify_says_when_the_arguments_look_swapped(lowbit, model, quantized):
    """The quantized one first, and a plain one behind it; of two plain ones it does not."""
    assert "the arguments look swapped; the original comes first" in lowbit("verify", quantized, model).out
    assert "swapped" not in lowbit("verify", model, model).out


def test_verify_ends_with_1_when_another_tensor_differs(lowbit, model, quantized):
    """A changed bias is found and named."""
    tensors = load_file(quantized)
    tensors["blocks.0.mlp.up.bias"][0] += 1
    save_file(tensors, quantized)

    done = lowbit("verify", model, quantized)

    assert done.code == 1
    assert "blocks.0.mlp.up.bias" in done.out


def test_dequantize_gives_plain_weights_back(lowbit, model, quantized, tmp_path):
    """Every weight is there in the asked dtype, close to the original, and the markers are gone."""
    out = tmp_path / "plain.safetensors"

    done = lowbit("dequantize", quantized, "-o", out, "--dtype", "float32")

    before, after = load_file(model), load_file(out)
    assert done.code == 0
    assert "6 layers decoded" in done.out
    assert after.keys() == before.keys()
    assert after["blocks.0.attn.q.weight"].dtype == torch.float32
    assert (
        torch.nn.functional.cosine_similarity(
            after["blocks.0.attn.q.weight"].flatten(), before["blocks.0.attn.q.weight"].float().flatten(), dim=0
        )
        > 0.999
    )


def test_dequantize_as_json(lowbit, quantized, tmp_path):
    """The document names every layer with the format it had."""
    report = lowbit("dequantize", quantized, "-o", tmp_path / "plain.safetensors", "--json").json

    assert len(report["layers"]) == 6
    assert set(report["layers"].values()) == {"fp8_e4m3"}


def test_dequantize_names_the_dtypes_there_are(lowbit, quantized, tmp_path):
    """An unknown dtype ends with 2 and the choices."""
    done = lowbit("dequantize", quantized, "-o", tmp_path / "o.safetensors", "--dtype", "int4")

    assert done.code == 2
    assert "bfloat16, float16, float32" in done.err


def test_migrate_goes_to_legacy_and_back_with_the_same_codes(lowbit, quantized, tmp_path):
    """Both ways keep codes and scales; the legacy file has its marker and none of the new ones."""
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"

    there = lowbit("migrate", quantized, "-o", old, "--to", "legacy")
    back = lowbit("migrate", old, "-o", new, "--json")

    legacy, before, after = load_file(old), load_file(quantized), load_file(new)
    assert (there.code, back.code) == (0, 0)
    assert len(back.json["layers"]) == 6
    assert "scaled_fp8" in legacy
    assert not any(key.endswith(".comfy_quant") for key in legacy)
    for key in ("blocks.1.mlp.up.weight", "blocks.1.mlp.up.weight_scale"):
        assert torch.equal(before[key].float(), after[key].float())


def test_migrate_names_the_styles_there_are(lowbit, quantized, tmp_path):
    """An unknown style ends with 2 and the choices."""
    done = lowbit("migrate", quantized, "-o", tmp_path / "o.safetensors", "--to", "newest")

    assert done.code == 2
    assert "current, legacy" in done.err


def test_formats_lists_every_registered_format(lowbit):
    """The table and the document come from the registry."""
    text, data = lowbit("formats"), lowbit("formats", "--json").json

    assert [entry["name"] for entry in data["formats"]] == list(formats())
    assert all(name in text.out for name in formats())
    assert all(entry["about"] and entry["variants"] for entry in data["formats"])
    assert {entry["name"]: entry["layouts"] for entry in data["formats"] if entry["layouts"]} == {
        "svdquant_w4a4": ["kitchen_tile_packed_w4a4"]
    }
    assert "svdquant_w4a4@kitchen_tile_packed_w4a4" in text.out


def test_doctor_shows_versions_and_why_a_backend_is_missing(lowbit):
    """Every backend stands there with its state."""
    text, data = lowbit("doctor"), lowbit("doctor", "--json").json

    assert text.code == 0
    assert data["packages"]["torch"] == metadata.version("torch")  # of some builds without what __version__ adds
    assert data["backends"]["eager"] == "available"
    assert all(name in text.out for name in data["backends"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_doctor_tells_kernels_that_compile_from_those_that_can_run(lowbit, monkeypatch):
    """Without a GPU its kernels are there, and none of them runs."""
    module = importlib.import_module("lowbit.cli.doctor")
    monkeypatch.setattr(module, "load", lambda _: None)
    monkeypatch.setattr(module, "_cpu_kernels", lambda: {"instruction_set": None, "usable": [], "pool": None})
    monkeypatch.setattr(module, "_cuda_kernels", lambda: None)

    lines = {line.split()[0]: line for line in lowbit("doctor").out.splitlines() if line.strip()}

    assert "its kernels compile, but there is no GPU here to run them" in lines["cuda"]
    assert lines["cpu"].split()[1] == "available"


def test_doctor_shows_the_instruction_set_of_the_cpu_kernels(lowbit):
    """What the compiled kernels use is one of what they could use; where there are none, the backend says why."""
    text, data = lowbit("doctor"), lowbit("doctor", "--json").json
    kernels = data["cpu_kernels"]

    if data["backends"]["cpu"] == "available":
        assert kernels["instruction_set"] in kernels["usable"]
        assert kernels["pool"]
    else:
        assert kernels == {"instruction_set": None, "usable": [], "pool": None}
        assert "scripts/build_native" in data["backends"]["cpu"]
    assert f"instruction set {kernels['instruction_set'] or 'none'}" in text.out
    assert f"usable: {', '.join(kernels['usable']) or 'none'}" in text.out


def test_doctor_without_compiled_kernels_says_how_to_get_them(tmp_path):
    """In a process that has none, doctor works, and the state of the backend names the remedy."""
    env = {**os.environ, "LOWBIT_CPU_MODULES": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lowbit", "doctor", "--json"]
    data = json.loads(subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout)

    assert data["cpu_kernels"] == {"instruction_set": None, "usable": [], "pool": None}
    assert "scripts/build_native" in data["backends"]["cpu"]
    assert data["backends"]["eager"] == "available"


def test_doctor_says_which_kernel_would_run_and_why_the_others_would_not(lowbit):
    """One reason a backend, and one kernel that runs."""
    arguments = ["doctor", "--format", "nvfp4", "--shape", "64x128", "-M", "3"]
    text, choice = lowbit(*arguments), lowbit(*arguments, "--json").json["choice"]

    assert choice["reasons"][choice["runs"]] == "runs"
    assert "does not run on cpu tensors" in choice["reasons"]["cuda"]
    assert f"runs: {choice['runs']}" in text.out


def test_doctor_knows_the_layout_of_a_format(lowbit):
    """Behind "@" stands the arrangement whose kernels are asked; a weight that it cannot hold has none."""
    spec = "svdquant_w4a4(rank=8)@kitchen_tile_packed_w4a4"
    fits, not_so = (lowbit("doctor", "--format", spec, "--shape", shape, "--json") for shape in ("256x128", "96x128"))

    assert (fits.code, fits.json["choice"]["format"]) == (0, spec)
    assert fits.json["choice"]["reasons"]["eager:linear_tiles"] == "runs"
    assert "tiles" in fits.json["choice"]["runs"]  # a compiled kernel, where there are any
    assert (not_so.code, not_so.json["choice"]["runs"]) == (1, None)
    assert "96 rows, not a multiple of 128" in not_so.json["choice"]["reasons"]["the format"]


def test_doctor_ends_with_1_when_the_format_cannot_hold_the_shape(lowbit):
    """The reason is the format's own."""
    done = lowbit("doctor", "--format", "awq_w4a16", "--shape", "64x65")

    assert done.code == 1
    assert "no kernel can run this" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "int9"], "known formats"),
        (["--format", "int8", "--shape", "12"], "write it as NxK"),
        (["--format", "int8", "--device", "moon"], "cannot be used"),
        (["--format", "int8", "--dtype", "int4"], "bfloat16, float16, float32"),
    ],
)
def test_doctor_refuses_wrong_options(lowbit, arguments, message):
    """Wrong values end with 2 and say what would be right."""
    done = lowbit("doctor", *arguments)

    assert done.code == 2
    assert message in done.err


def test_dtypes_have_short_names(lowbit, quantized, tmp_path):
    """What calibrate takes as bf16 the others take, too."""
    assert lowbit("dequantize", quantized, "-o", tmp_path / "back.safetensors", "--dtype", "fp16").code == 0
    assert load_file(tmp_path / "back.safetensors")["blocks.0.attn.q.weight"].dtype == torch.float16
    asked = lowbit("doctor", "--format", "int8", "--shape", "64x64", "--dtype", "bf16", "--json")
    assert asked.json["choice"]["dtype"] == "bfloat16"


def test_doctor_says_what_convert_makes_of_a_name(lowbit):
    """int8 alone is the unrotated linear here, and a rotated one after `convert`; who names the rotation knows."""
    said = "note: convert rotates int8 by default; ask with --format 'int8(rotation=256)'"
    asked = ("doctor", "--shape", "64x512", "--format")

    assert said in lowbit(*asked, "int8").out
    assert lowbit(*asked, "int8", "--json").json["choice"]["notes"] == [said.removeprefix("note: ")]
    for other in ("int8(rotation=256)", "int8(rotation=0)", "int8(granularity=block)", "fp8_e4m3"):
        assert "convert rotates" not in lowbit(*asked, other).out
