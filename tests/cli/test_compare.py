"""`lowbit compare`: tables, JSON and exit codes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def four(lowbit, model, tmp_path):
    """The tiny model in nvfp4."""
    path = tmp_path / "four.safetensors"
    assert lowbit("convert", model, "-o", path, "--format", "nvfp4").code == 0
    return path


def rewrite(path, change):
    """Write a file again with its tensors changed by `change(tensors)`."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def test_candidates_stand_side_by_side(lowbit, model, quantized, four):
    """Both candidates with their sizes and totals, then the worst layers of all, the worst first."""
    done = lowbit("compare", model, quantized, four, "--worst", "3")

    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    starts = [line[0] for line in lines if line]
    assert starts.count("fp8") == 1
    assert starts.count("four") == 1
    worst = [line for line in lines if line and line[0].startswith("blocks.")]
    assert len(worst) == 3
    assert {line[1] for line in worst} == {"four"}
    assert [float(line[4]) for line in worst] == sorted(float(line[4]) for line in worst)
    assert "6 layers quantized, 1 kept exactly" in done.out


def test_json_holds_every_layer(lowbit, model, quantized, four):
    """--json has the totals and all layers of each candidate."""
    found = lowbit("compare", model, quantized, four, "--json", "--no-rtn").json

    assert [candidate["name"] for candidate in found["candidates"]] == ["fp8", "four"]
    assert all(len(candidate["layers"]) == 7 for candidate in found["candidates"])
    first, second = (candidate["totals"] for candidate in found["candidates"])
    assert first["sqnr"] > second["sqnr"] > 15
    assert first["flips"] is None
    assert found["problems"] == []


def test_a_changed_tensor_ends_with_1(lowbit, model, quantized):
    """A kept layer and another tensor that differ are named, in the table and in JSON."""

    def change(tensors):
        tensors["small.weight"] *= 1.5
        tensors["blocks.0.norm.weight"] *= 1.5
        tensors["blocks.0.mlp.up.weight_scale"].fill_(float("inf"))

    rewrite(quantized, change)
    done = lowbit("compare", model, quantized)

    assert done.code == 1
    assert "problem: fp8: small: was kept, but differs" in done.out
    assert "problem: fp8: blocks.0.norm.weight: differs" in done.out
    assert "blocks.0.mlp.up: 1 values of its scales are not finite" in done.out
    assert len(lowbit("compare", model, quantized, "--json").json["problems"]) == 3


def test_another_model_ends_with_3(lowbit, model, tmp_path):
    """A file that lacks layers is one line on stderr."""
    save_file({"other.weight": torch.ones(64, 64)}, tmp_path / "other.safetensors")

    done = lowbit("compare", model, tmp_path / "other.safetensors")

    assert done.code == 3
    assert done.err.startswith("error: ")
    assert "lacks blocks.0.attn.q" in done.err
    assert done.out == ""
