"""Statistics of a model with other weights: used, with one warning; those of the same model in any form without."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit as library
from lowbit.calibration import StatisticsFile
from tests.cli.conftest import tiny_model

SAID = "are of a model with other weights"
FORMAT = ("--format", "int8", "--preset", "none", "--only", "attn|mlp")


class Each(nn.Module):
    """The linears of a checkpoint, each run on as many channels as it has."""

    def __init__(self, weights):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(*reversed(w.shape), bias=False) for w in weights)
        for linear, w in zip(self.linears, weights, strict=True):
            linear.weight = nn.Parameter(w)

    def forward(self, x):
        """x [T, 128]."""
        return [linear(x[:, : linear.in_features].to(linear.weight.dtype)) for linear in self.linears]


def calibrated(checkpoint, path, dtype=torch.float32):
    """The statistics of a checkpoint's linears, run in a dtype."""
    weights = {name: w for name, w in load_file(checkpoint).items() if name.endswith("weight") and w.dim() == 2}
    model = Each([w.to(dtype) for w in weights.values()])
    names = {f"linears.{index}": name.removesuffix(".weight") for index, name in enumerate(weights)}
    random = torch.Generator().manual_seed(1)
    batches = [torch.randn(64, 128, generator=random) for _ in range(4)]
    library.calibrate(model, batches, path=path, names=names).close()
    return path


@pytest.fixture
def stats(model, tmp_path):
    """Statistics of the model."""
    return calibrated(model, tmp_path / "s.safetensors")


def other(path, share=1.0):
    """The tiny model, trained on: with this share of another one's weights."""
    w, more = (load_file(tiny_model(path, seed)) for seed in (0, 1))
    save_file({name: (w[name] + share * (more[name] - w[name])).bfloat16() for name in w}, path)
    return path


def sharded(checkpoint, folder):
    """A checkpoint as two shards and an index."""
    folder.mkdir()
    tensors = load_file(checkpoint)
    files = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    where = {name: files[index % 2] for index, name in enumerate(tensors)}
    for file in files:
        save_file({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def cast(checkpoint, path, dtype, prefix=""):
    """A checkpoint in another dtype, its names behind a prefix."""
    save_file({prefix + name: x.to(dtype) for name, x in load_file(checkpoint).items()}, path)
    return path


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_a_conversion_with_them_says_so_once(lowbit, stats, tmp_path, share):
    """The file, how many layers differ and the first ones; the JSON has the same line, and the output is written."""
    tuned = other(tmp_path / "tuned.safetensors", share)
    arguments = ("convert", tuned, *FORMAT, "--stats", stats)

    done = lowbit(*arguments, "-o", tmp_path / "out.safetensors")
    as_json = lowbit(*arguments, "-o", tmp_path / "again.safetensors", "--json")

    assert (done.code, as_json.code) == (0, 0)
    assert done.err.count(SAID) == 1
    assert f"{stats}: {SAID}" in done.err
    assert "7 of 7 layers compared differ (blocks.0.attn.q, blocks.0.mlp.down, blocks.0.mlp.up and 4 more)" in done.err
    (line,) = as_json.json["warnings"]
    assert f"warning: {line}\n" in done.err
    assert (tmp_path / "out.safetensors").exists()


def test_every_command_that_takes_them_says_so(lowbit, stats, tmp_path):
    """Plan, plan for a size, compare and export: on stderr, and in the JSON."""
    tuned = other(tmp_path / "tuned.safetensors")
    assert lowbit("convert", tuned, "-o", tmp_path / "out.safetensors", *FORMAT).code == 0
    for arguments in [
        ("plan", tuned, *FORMAT),
        ("plan", tuned, "--target-size", "0.6x", "--preset", "none"),
        ("compare", tuned, tmp_path / "out.safetensors"),
        ("export", tuned, "-o", tmp_path / "out.gguf"),
    ]:
        done = lowbit(*arguments, "--stats", stats, "--json")
        assert done.code == 0, done.err
        assert done.err.count(SAID) == 1
        assert sum(SAID in line for line in done.json["warnings"]) == 1


def test_only_the_layers_that_differ_are_named(lowbit, model, stats, tmp_path):
    """One layer that was trained on is one of seven."""
    tensors = load_file(model)
    tensors["blocks.1.mlp.up.weight"] = tensors["blocks.1.mlp.up.weight"] * 1.1
    save_file(tensors, tmp_path / "tuned.safetensors")

    done = lowbit("plan", tmp_path / "tuned.safetensors", *FORMAT, "--stats", stats)

    assert "1 of 7 layers compared differ (blocks.1.mlp.up)" in done.err


@pytest.mark.parametrize("ran", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_model_in_another_dtype_is_the_same(lowbit, model, tmp_path, ran, saved):
    """Whatever it was run in and saved as, by way of either 16-bit dtype."""
    stats = calibrated(model, tmp_path / "s.safetensors", ran)

    done = lowbit("plan", cast(model, tmp_path / "m.safetensors", saved), *FORMAT, "--stats", stats, "--json")

    assert done.code == 0
    assert SAID not in done.err
    assert done.json["warnings"] == []


def test_the_same_model_in_shards_is_the_same(lowbit, model, stats, tmp_path):
    """By an index with two shards."""
    done = lowbit("convert", sharded(model, tmp_path / "m"), "-o", tmp_path / "out", *FORMAT, "--stats", stats)

    assert done.code == 0, done.err
    assert SAID not in done.err


def test_a_prefix_of_the_names_does_not_matter(lowbit, model, tmp_path):
    """A ComfyUI file gives its names to a module that lacks the prefix, and the weights are found under them."""
    file = cast(model, tmp_path / "comfy.safetensors", torch.float16, "model.diffusion_model.")
    factory = tmp_path / "factory.py"
    factory.write_text(
        "import torch\nfrom safetensors.torch import load_file\nfrom torch import nn\n\n"
        "def make():\n"
        "    model = nn.ModuleDict({'blocks': nn.ModuleList(nn.ModuleDict({'mlp': nn.ModuleDict(\n"
        "        {'up': nn.Linear(64, 128), 'down': nn.Linear(128, 64)})}) for _ in range(2))})\n"
        f"    model.load_state_dict(load_file({str(model)!r}), strict=False)\n"
        "    model.forward = lambda x: [b['mlp']['down'](b['mlp']['up'](x)) for b in model['blocks']]\n"
        "    return model, [torch.randn(8, 64) for _ in range(4)]\n"
    )
    stats = tmp_path / "s.safetensors"
    assert lowbit("calibrate", file, "--module", f"{factory}:make", "-o", stats).code == 0

    done = lowbit("plan", file, *FORMAT, "--stats", stats)
    tuned = other(tmp_path / "tuned.safetensors")
    warned = lowbit("plan", cast(tuned, file, torch.float16, "model.diffusion_model."), *FORMAT, "--stats", stats)

    assert (done.code, SAID in done.err) == (0, False)
    assert "4 of 4 layers compared differ (model.diffusion_model.blocks.0.mlp.up" in warned.err


def test_files_without_marks_and_quantized_layers_are_not_compared(lowbit, stats, tmp_path):
    """Statistics of an earlier version say nothing of weights; codes are no weights."""
    tuned, out = other(tmp_path / "tuned.safetensors"), tmp_path / "out.safetensors"
    with safe_open(stats, "pt") as file:
        facts = json.loads(file.metadata()["lowbit.statistics"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    for layer in facts["layers"].values():
        assert len(layer.pop("weight")) == 172
    save_file(tensors, tmp_path / "old.safetensors", {"lowbit.statistics": json.dumps(facts)})

    done = lowbit("convert", tuned, "-o", out, *FORMAT, "--stats", tmp_path / "old.safetensors")
    again = lowbit("plan", out, *FORMAT, "--requantize", "--stats", stats)

    assert (done.code, SAID in done.err) == (0, False)
    assert "1 of 1 layers compared differ (small)" in again.err
    with StatisticsFile(tmp_path / "old.safetensors") as file:
        assert "weight" not in file.contents.to_json()["layers"]["small"]


def test_of_many_layers_some_are_compared(lowbit, tmp_path):
    """So that a large model takes no more than 32 times 64 reads."""
    random = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        tensors = {f"layers.{i}.attn.weight": torch.randn(32, 32, generator=random) for i in range(70)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    stats = calibrated(tmp_path / "a.safetensors", tmp_path / "s.safetensors")

    same = lowbit("plan", tmp_path / "a.safetensors", *FORMAT, "--stats", stats)
    other = lowbit("plan", tmp_path / "b.safetensors", *FORMAT, "--stats", stats)

    assert (same.code, SAID in same.err) == (0, False)
    assert "32 of 32 layers compared differ" in other.err
