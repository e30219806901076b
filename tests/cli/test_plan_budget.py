"""`lowbit plan --target-size` and `--target-sqnr`: from a wish to a plan that `convert` runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibration import calibrate, save_statistics
from lowbit.checkpoint.plan import Plan

NVFP4_OR_INT8 = ("--formats", "nvfp4; int8(granularity=row,activations=none)")


@pytest.mark.parametrize(("wish", "most"), [("0.4x", 0.4), ("45kB", None), ("40KiB", None), ("43000", None)])
def test_the_plan_keeps_the_size_and_convert_runs_it(lowbit, model, tmp_path, wish, most):
    """The table shows formats and size; the converted tensors are as large as planned and not larger than asked."""
    before = sum(tensor.nbytes for tensor in load_file(model).values())
    limit = {"45kB": 45000, "40KiB": 40960, "43000": 43000}.get(wish) or most * before

    done = lowbit("plan", model, "--target-size", wish, *NVFP4_OR_INT8, "-o", tmp_path / "plan.json")
    converted = lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--plan", tmp_path / "plan.json")

    assert (done.code, converted.code) == (0, 0)
    assert "nvfp4" in done.out
    assert "output SQNR" in done.out
    assert f"mixed precision: --target-size {wish}" in done.out
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "out.safetensors").values())
    assert written == Plan.load(tmp_path / "plan.json").bytes_after
    assert limit * 0.9 < written <= limit


def test_as_json_it_is_one_document_with_all_measurements(lowbit, model):
    """The plan, its totals, and for each layer what was chosen and what the others would have been."""
    found = lowbit("plan", model, "--target-sqnr", "25", *NVFP4_OR_INT8, "--json").json

    mixed = found["mixed"]
    assert mixed["sqnr"] >= 25
    assert mixed["bytes"] == found["totals"]["bytes_after"]
    assert len(mixed["layers"]) == 6
    assert sum(row["layers"] for row in mixed["formats"]) == 6
    for layer in mixed["layers"].values():
        assert layer["chosen"] in layer["choices"]
        assert set(layer["choices"]) == {"nvfp4", "int8(activations=none)", "as it is"}
    assert found["warnings"] == []
    more = ("mixed", "totals", "warnings")
    assert Plan.from_json({name: found[name] for name in found if name not in more}).count("keep") >= 9


def test_formats_may_be_repeated(lowbit, model):
    """--formats twice is the same as both in one, specs with commas included."""
    one = lowbit("plan", model, "--target-size", "0.4x", *NVFP4_OR_INT8, "--json").json
    two = lowbit(
        "plan",
        model,
        "--target-size",
        "0.4x",
        "--formats",
        "nvfp4",
        "--formats",
        NVFP4_OR_INT8[1].split(";")[1],
        "--json",
    ).json

    assert one == two


def test_a_weight_draws_bits_to_its_layers(lowbit, model):
    """The layers of a block whose errors count a hundredfold get more of the better format, whichever that is."""
    for block in "01":
        mixed = lowbit(
            "plan", model, "--target-size", "0.42x", *NVFP4_OR_INT8, "--weight", rf"blocks\.{block}=100", "--json"
        ).json["mixed"]
        better = {name for name, layer in mixed["layers"].items() if layer["chosen"] != "nvfp4"}
        weights = {"attn.q": 64 * 64, "mlp.up": 64 * 128, "mlp.down": 64 * 128}
        improved = [
            sum(weights[name[9:]] for name in better if name[7] == which) for which in (block, "10"[int(block)])
        ]
        assert improved[0] > 2 * improved[1]


def test_statistics_choose_measure_and_solve(lowbit, tmp_path):
    """With --stats errors are those of outputs, solvers are calibrated ones, and convert takes the same file."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    path, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    save_file({key: tensor.detach().clone() for key, tensor in model.state_dict().items()}, path)
    batches = [torch.randn((64, 64), generator=generator) * torch.logspace(-1, 1, 64) for _ in range(8)]
    save_statistics(calibrate(model, batches), stats)
    arguments = ("plan", path, "--target-size", "0.2x", *NVFP4_OR_INT8, "--json")

    plain = lowbit(*arguments).json
    known = lowbit(*arguments, "--stats", stats, "-o", tmp_path / "plan.json").json
    done = lowbit("convert", path, "-o", tmp_path / "o.safetensors", "--plan", tmp_path / "plan.json", "--stats", stats)

    assert done.code == 0
    assert known["mixed"]["layers"]["0"]["choices"] != plain["mixed"]["layers"]["0"]["choices"]
    assert any("gptq" in tensor.solver for tensor in Plan.load(tmp_path / "plan.json").tensors())


def test_gradients_that_count_for_nothing_are_said(lowbit, tmp_path):
    """Where one layer lacks gradients none counts by them: a warning names it, and keeping it lets the others."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    path, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    table = torch.randn(128, 64)
    save_file({**{k: v.detach().clone() for k, v in model.state_dict().items()}, "table.weight": table}, path)
    save_statistics(calibrate(model, [torch.randn(64, 64) for _ in range(8)], gradients=True), stats)
    arguments = ("plan", path, "--target-size", "0.4x", *NVFP4_OR_INT8, "--stats", stats)

    some = lowbit(*arguments)
    rest = lowbit(*arguments, "--keep", "table", "--target-size", "0.6x")

    assert "warning: 1 of 3 layers with a choice have no gradients (table), so all layers count the same" in some.err
    assert "output SQNR" in some.out
    assert "warning" not in rest.err
    assert "SQNR of the model's output, by gradients" in rest.out


def test_measurements_are_kept_and_used_again(lowbit, model, tmp_path):
    """The file of --sensitivities holds every layer and format; another target takes the errors that stand in it."""
    file = tmp_path / "s.json"
    arguments = ("plan", model, *NVFP4_OR_INT8, "--sensitivities", file)
    assert lowbit(*arguments, "--target-size", "0.5x").code == 0
    data = json.loads(file.read_text())
    assert len(data["layers"]) == 6
    data["layers"]["blocks.0.attn.q"]["nvfp4"][1] = 0.25
    file.write_text(json.dumps(data))

    found = lowbit(*arguments, "--target-size", "0.4x", "--json").json

    assert found["mixed"]["layers"]["blocks.0.attn.q"]["choices"]["nvfp4"]["error"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-size", "0.3x", "--target-sqnr", "30"], "give one of them"),
        (["--target-size", "0.3x", "--format", "nvfp4"], "give --formats"),
        (["--target-size", "0.3x", "--requantize"], "--requantize does not go with a target"),
        (["--target-size", "small"], "write it as a share of the source such as 0.3x"),
        (["--target-size", "0.3"], "write it as a share of the source such as 0.3x"),
        (["--target-size", "1IB"], "write it as a share of the source such as 0.3x"),
        (["--target-size", 400 * "9"], "write it as a share of the source such as 0.3x"),
        (["--target-sqnr", "-5000"], "write a positive number of dB"),
        (["--target-sqnr", "nan"], "write a positive number of dB"),
        (["--target-size", "0x"], "write it as a share of the source such as 0.3x"),
        (["--target-size", "0.3x", "--formats", "nvfp5"], "unknown format 'nvfp5'"),
        (["--target-size", "0.3x", "--measure-with", "magic"], "unknown solver 'magic'"),
        (["--target-size", "0.3x", "--layer", "blocks"], "write it as REGEX=FORMAT"),
        (["--target-size", "0.05x"], "cannot be reached: with these formats the smallest size is"),
        (["--target-sqnr", "50", "--layer", "attn=nvfp4"], "50 dB cannot be reached"),
        (["--target-size", "0.4x", "--weight", "blocks"], "write it as REGEX=NUMBER"),
        (["--target-size", "0.4x", "--weight", "blocks=0"], "write a positive number"),
        (["--target-size", "0.4x", "--weight", "block(=2"], "is no regular expression"),
        (["--target-size", "0.4x", "--weight", "norm=2"], "matches no layer that has a choice"),
        (["--formats", "nvfp4"], "--formats: give --target-size or --target-sqnr with it"),
        (["--format", "nvfp4", "--rows", "7"], "--rows: give --target-size or --target-sqnr with it"),
        ([], "say what to convert to with --format SPEC"),
    ],
)
def test_what_cannot_be_is_one_line_and_2(lowbit, model, tmp_path, arguments, message):
    """Contradictions, wrong values and targets out of reach: exit 2, one line, and no plan file."""
    done = lowbit("plan", model, *arguments, "-o", tmp_path / "plan.json")

    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


def test_a_quantized_source_is_refused(lowbit, quantized):
    """Formats are chosen for 16-bit weights; the message says to start from them."""
    done = lowbit("plan", quantized, "--target-size", "0.3x")

    assert done.code == 2
    assert "is quantized already" in done.err
