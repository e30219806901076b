"""`lowbit compare`: tables, JSON and exit codes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibration.collect import calibrate
from lowbit.calibration.statistics_file import save_statistics
from tests.support.checkpoints import rewrite


@pytest.fixture
def four(lowbit, model, tmp_path):
    """The tiny model in nvfp4."""
    path = tmp_path / "four.safetensors"
    assert lowbit("convert", model, "-o", path, "--format", "nvfp4").code == 0
    return path


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


def test_layers_of_one_side_are_named(lowbit, model, tmp_path):
    """Table, JSON and page name them, and the others are compared; the code is 0, and 1 with --strict."""
    tensors = {key: tensor for key, tensor in load_file(model).items() if ".mlp.up." not in key}
    save_file(tensors, tmp_path / "fewer.safetensors")
    part = tmp_path / "part.safetensors"
    assert lowbit("convert", tmp_path / "fewer.safetensors", "-o", part, "--format", "fp8_e4m3").code == 0
    command = ("compare", model, part)
    page = tmp_path / "page.html"

    done = lowbit(*command, "--html", page)
    strict = lowbit(*command, "--strict")
    found = lowbit(*command, "--json")

    assert (done.code, strict.code, found.code) == (0, 1, 0)
    said = "part: lacks the layers blocks.*.mlp.up (2)"
    assert said in done.out
    assert "problem" not in done.out
    assert f"problem: {said}" in strict.out
    assert "lacks the tensors" in strict.out
    (candidate,) = found.json["candidates"]
    assert candidate["missing_layers"] == ["blocks.0.mlp.up", "blocks.1.mlp.up"]
    assert candidate["missing"] == ["blocks.0.mlp.up.bias", "blocks.1.mlp.up.bias"]
    assert (len(candidate["layers"]), found.json["problems"]) == (5, [])
    assert "lacks the layers blocks." in page.read_text(encoding="utf-8")
    assert lowbit("compare", part, model, "--json").json["candidates"][0]["extra_layers"] == [
        "blocks.0.mlp.up",
        "blocks.1.mlp.up",
    ]


FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(self.up(torch.tanh(self.q(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def make():
    torch.manual_seed(0)
    return Net().bfloat16(), [torch.randn(8, 64).bfloat16()]
"""


@pytest.fixture
def net(lowbit, tmp_path, monkeypatch):
    """A factory in the current folder, and its model as a checkpoint, plain and in int8."""
    (tmp_path / "compared_net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(FACTORY, scope)
    save_file(scope["make"]()[0].state_dict(), "net.safetensors")
    assert lowbit("convert", "net.safetensors", "-o", "eight.safetensors", "--format", "int8").code == 0
    return tmp_path


def test_a_model_is_run_and_shown_on_a_page(lowbit, net):
    """--module adds the model's error and that of its blocks to table, JSON and page."""
    command = ("compare", "net.safetensors", "eight.safetensors", "--module", "compared_net:make")
    done = lowbit(*command, "--html", "page.html")
    found = lowbit(*command, "--json").json["candidates"][0]["end_to_end"]

    assert done.code == 0
    assert "end to end: prediction, 1 compared" in done.out
    assert "blocks.0" in done.out
    assert 0 < found["measures"]["relative error"] < 0.1
    assert [block["name"] for block in found["blocks"]] == ["blocks.0", "blocks.1"]
    text = (net / "page.html").read_text(encoding="utf-8")
    assert "relative error, end to end" in text
    assert text.count("<tr data-name=") == 6


def test_statistics_add_the_error_of_outputs(lowbit, net):
    """--stats judges each layer by its inputs; a file that is no statistics file is an error."""
    scope = {}
    exec(FACTORY, scope)
    model, batches = scope["make"]()
    collected = calibrate(model.float(), [batch.float() for batch in batches])
    save_statistics(collected, "net.stats")

    found = lowbit("compare", "net.safetensors", "eight.safetensors", "--stats", "net.stats", "--json").json

    assert found["with_statistics"] is True
    assert found["unmeasured"] == []
    layers = found["candidates"][0]["layers"]
    assert all(layer["output_sqnr"] > 20 for layer in layers)
    assert any(abs(layer["output_sqnr"] - layer["accuracy"]["sqnr"]) > 0.01 for layer in layers)
    refused = lowbit("compare", "net.safetensors", "eight.safetensors", "--stats", "net.safetensors")
    assert refused.code == 3
    assert "is no statistics file" in refused.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--model", "."), "--model and --text belong together"),
        (("--text", "text.txt"), "--model and --text belong together"),
        (("--module", "a:b", "--model", "."), "leave --model and --text out"),
        (("--samples", "8"), "--samples is of --text, and there is none"),
        (("--device", "cuda"), "--device is of --text or --stats, and there is neither"),
        (("--model", ".", "--text", "a.txt", "--device", "cuda:99"), "device 'cuda:99': cannot be used"),
        (("--stats", "a.stats", "--device", "cuda:99"), "device 'cuda:99': cannot be used"),
        (("--module", "nothing"), "write it as PACKAGE.MODULE:FUNCTION"),
        (("--module", "no_such_package:make"), "cannot be imported"),
    ],
)
def test_options_that_do_not_go_together_end_with_2(lowbit, model, quantized, options, complaint):
    """What cannot be run is told before anything is read."""
    done = lowbit("compare", model, quantized, *options)

    assert done.code == 2
    assert complaint in done.err
