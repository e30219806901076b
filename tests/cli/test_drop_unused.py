"""`--drop-unused`: what a preset says that nobody needs is left out, and is not missed afterwards."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def t5_names():
    """A table, a layer of T5's encoder, one of its decoder, and its head."""
    layer = "block.0.layer.0.SelfAttention.q.weight"
    return "shared.weight", f"encoder.{layer}", f"decoder.{layer}", "lm_head.weight"


def test_what_a_preset_calls_unused_is_left_out_on_demand(lowbit, tmp_path, model):
    """T5's decoder goes with --drop-unused; where there is nothing to drop, or for a target, the option is refused."""
    save_file({name: torch.randn(64, 64).bfloat16() for name in t5_names()}, tmp_path / "t5.safetensors")
    out = tmp_path / "out.safetensors"

    done = lowbit("convert", tmp_path / "t5.safetensors", "-o", out, "--format", "int8", "--drop-unused")

    assert done.code == 0
    assert "2 left out" in done.out
    assert not [key for key in load_file(out) if key.startswith(("decoder.", "lm_head."))]
    for refused in (("--format", "int8"), ("--target-size", "0.6x")):
        found = lowbit("plan", model, *refused, "--drop-unused")
        assert (found.code, "--drop-unused" in found.err) == (2, True)


@pytest.mark.parametrize("shards", [False, True])
def test_what_a_conversion_dropped_is_not_missing(lowbit, tmp_path, shards):
    """verify names what --drop-unused left out, after migrating too, with 0; what was lost since then is missing."""
    tensors = {name: torch.randn(64, 64).bfloat16() for name in t5_names()}
    source, out = tmp_path / "t5.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    if shards:
        source, out = tmp_path / "t5", tmp_path / "out"
        source.mkdir()
        places = {name: f"{index}.safetensors" for index, name in enumerate(tensors)}
        for name, place in places.items():
            save_file({name: tensors[name]}, source / place)
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    decoder, head = t5_names()[2:]
    assert lowbit("convert", source, "-o", out, "--format", "int8", "--drop-unused").code == 0
    again = tmp_path / ("again" if shards else "again.safetensors")
    assert lowbit("migrate", out, "-o", again).code == 0

    for made in (out, again):
        done = lowbit("verify", source, made)
        assert (done.code, "problem" in done.out) == (0, False), done.out
        assert f"2 tensors of SRC were left out by the conversion: {decoder}, {head}" in done.out
        assert lowbit("verify", source, made, "--json").json["dropped"] == [decoder, head]
    found = lowbit("compare", source, out, "--strict")
    assert (found.code, f"out: the conversion left out {decoder}, {head} (2)" in found.out) == (0, True), found.out
    if not shards:
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
        save_file({key: value for key, value in load_file(out).items() if key != "shared.weight"}, out, metadata)
        done = lowbit("verify", source, out)
        assert (done.code, "'shared.weight' of the source is missing" in done.out) == (1, True)


def test_a_layer_that_is_quantized_already_may_be_dropped(lowbit, tmp_path):
    """Of a quantized source the plain name of a dropped layer is told; a layer converted again is no dropped one."""
    source, int8, out = (tmp_path / f"{name}.safetensors" for name in ("t5", "int8", "out"))
    save_file({name: torch.randn(64, 64).bfloat16() for name in t5_names()}, source)
    assert lowbit("convert", source, "-o", int8, "--format", "int8", "--preset", "none").code == 0
    done = lowbit("convert", int8, "-o", out, "--format", "fp8_e4m3", "--requantize", "--drop-unused")
    assert done.code == 0, done.err

    for path in (source, int8):
        assert lowbit("verify", path, out, "--json").json["dropped"] == list(t5_names()[2:])
