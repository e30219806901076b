"""`--full-precision-matrix-mult`: markers that ask ComfyUI for products in full precision."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lowbit.formats.parts import raw_bytes


def marker(path, layer):
    """What the marker of a layer says."""
    return json.loads(bytes(load_file(path)[f"{layer}.comfy_quant"].tolist()))


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2", "mxfp8", "nvfp4"])
def test_markers_ask_for_products_in_full_precision(lowbit, model, tmp_path, spec):
    """--full-precision-matrix-mult writes the field for the layers that match and no other; migrate keeps it."""
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"

    done = lowbit("convert", model, "-o", out, "--format", spec, "--full-precision-matrix-mult", "mlp")

    assert done.code == 0, done.err
    assert lowbit("migrate", out, "-o", again).code == 0
    for path in (out, again):
        assert marker(path, "blocks.1.mlp.up")["full_precision_matrix_mult"] is True
        assert "full_precision_matrix_mult" not in marker(path, "blocks.1.attn.q")
    assert lowbit("verify", model, again).code == 0


def test_full_precision_products_stay_when_layers_are_converted_again(lowbit, model, tmp_path):
    """--requantize keeps what the source's marker says, in formats that can say it."""
    first = tmp_path / "first.safetensors"
    asked = ("--format", "fp8_e4m3", "--full-precision-matrix-mult", "mlp")
    assert lowbit("convert", model, "-o", first, *asked).code == 0

    for spec, kept in (("nvfp4", True), ("int8", False)):
        out = tmp_path / f"{spec}.safetensors"
        assert lowbit("convert", first, "-o", out, "--format", spec, "--requantize").code == 0
        assert ("full_precision_matrix_mult" in marker(out, "blocks.1.mlp.up")) == kept
        assert "full_precision_matrix_mult" not in marker(out, "blocks.1.attn.q")


def test_full_precision_products_come_through_a_plan(lowbit, model, tmp_path):
    """The plan file says it of each layer, and a wrong word in it is refused."""
    plan, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    asked = ("--format", "nvfp4", "--full-precision-matrix-mult", ".")
    assert lowbit("plan", model, *asked, "-o", plan).code == 0
    assert lowbit("convert", model, "-o", out, "--plan", plan).code == 0
    assert marker(out, "blocks.0.attn.q")["full_precision_matrix_mult"] is True

    plan.write_text(plan.read_text().replace('"full_precision_matrix_mult"', '"half_precision"'))
    found = lowbit("convert", model, "-o", out, "--plan", plan)
    assert (found.code, "options is 'half_precision'" in found.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "int8"), "write it with activations=none"),
        (("--format", "svdquant_w4a4(rank=16)"), "leave the layer out"),
        (("--format", "nvfp4", "--keep", "."), "matches no layer that is quantized"),
        (("--format", "nvfp4", "--dialect", "modelopt"), "modelopt has no place"),
    ],
)
def test_full_precision_products_are_refused_where_nothing_could_say_so(lowbit, model, arguments, said):
    """A format that rounds by definition, a pattern without a layer and another dialect are errors that say why."""
    found = lowbit("plan", model, *arguments, "--full-precision-matrix-mult", ".")
    assert (found.code, said in found.err) == (2, True), found.err


def test_full_precision_products_of_weight_only_formats_are_noted(lowbit, model):
    """A format that never rounds its input is left as it is, and the plan says so."""
    done = lowbit("plan", model, "--format", "awq_w4a16", "--full-precision-matrix-mult", ".")
    assert (done.code, "never rounds its input" in done.out) == (0, True)


def test_markers_of_a_quantized_file_are_changed_by_migrate(lowbit, model, tmp_path):
    """migrate says it of layers that match, takes it back from others, and leaves every code as it is."""
    first, on, off = (tmp_path / f"{name}.safetensors" for name in ("first", "on", "off"))
    assert lowbit("convert", model, "-o", first, "--format", "fp8_e4m3").code == 0

    assert lowbit("migrate", first, "-o", on, "--full-precision-matrix-mult", ".").code == 0
    asked = ("--full-precision-matrix-mult", ".", "--no-full-precision-matrix-mult", "mlp")
    assert lowbit("migrate", on, "-o", off, *asked).code == 0

    assert marker(on, "blocks.1.mlp.up")["full_precision_matrix_mult"] is True
    assert "full_precision_matrix_mult" not in marker(off, "blocks.1.mlp.up")
    assert marker(off, "blocks.1.attn.q")["full_precision_matrix_mult"] is True
    before, after = load_file(first), load_file(off)
    assert before.keys() == after.keys()
    for key in before:
        if not key.endswith(".comfy_quant"):
            assert torch.equal(raw_bytes(before[key]), raw_bytes(after[key])), key


def test_an_older_file_gets_it_while_it_is_migrated(lowbit, model, tmp_path):
    """A scaled_fp8 file whose marker does not ask for it becomes a current one whose markers do."""
    first, old, new = (tmp_path / f"{name}.safetensors" for name in ("first", "old", "new"))
    assert lowbit("convert", model, "-o", first, "--format", "fp8_e4m3").code == 0
    assert lowbit("migrate", first, "-o", old, "--to", "legacy").code == 0

    assert lowbit("migrate", old, "-o", new, "--full-precision-matrix-mult", "attn").code == 0

    assert marker(new, "blocks.1.attn.q")["full_precision_matrix_mult"] is True
    assert "full_precision_matrix_mult" not in marker(new, "blocks.1.mlp.up")


@pytest.mark.parametrize(
    ("spec", "arguments", "said"),
    [
        ("int8", ("--full-precision-matrix-mult", "."), "write it with activations=none"),
        ("nvfp4", ("--full-precision-matrix-mult", "nothing"), "matches no layer; a layer's name is"),
        ("nvfp4", ("--no-full-precision-matrix-mult", "nothing"), "--no-full-precision-matrix-mult 'nothing' matches"),
        ("nvfp4", ("--full-precision-matrix-mult", "("), "is no regular expression"),
        ("nvfp4", ("--full-precision-matrix-mult", ".", "--to", "modelopt"), "modelopt has no place"),
    ],
)
def test_migrate_refuses_what_no_marker_could_say(lowbit, model, tmp_path, spec, arguments, said):
    """A format that rounds by definition, a pattern without a layer and another dialect are errors that say why."""
    first, out = tmp_path / "first.safetensors", tmp_path / "out.safetensors"
    assert lowbit("convert", model, "-o", first, "--format", spec).code == 0

    found = lowbit("migrate", first, "-o", out, *arguments)

    assert (found.code, said in found.err, out.exists()) == (2, True, False), found.err


def test_migrate_notes_formats_that_it_says_nothing_of(lowbit, model, tmp_path):
    """A format that never rounds its input stays as it is, with a note."""
    first, out = tmp_path / "first.safetensors", tmp_path / "out.safetensors"
    assert lowbit("convert", model, "-o", first, "--format", "awq_w4a16").code == 0

    done = lowbit("migrate", first, "-o", out, "--full-precision-matrix-mult", ".")

    assert (done.code, "never rounds its input" in done.out) == (0, True)
