"""A conversion with statistics uses them, says what came of it, and refuses what it does not know."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowbit.calibration import calibrate
from lowbit.checkpoint import convert_layer
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.cli import app
from lowbit.errors import PlanError, SolverError
from lowbit.solvers import Statistics, solve
from tests.support import outlier_weight
from tests.support.checkpoints import files_below
from tests.support.layers import Layer

LAYERS = {"up": (96, 64), "down": (64, 96), "unknown": (64, 64)}


def tensors() -> dict[str, torch.Tensor]:
    """Two layers with a bias, one of them without statistics, and one with neither norm nor bias."""
    made = {f"{name}.weight": outlier_weight(*shape, seed=shape[0]) for name, shape in LAYERS.items()}
    return made | {"up.bias": torch.linspace(-1, 1, 96), "unknown.bias": torch.zeros(64)}


def known(seed: int = 0) -> dict[str, Statistics]:
    """What is known of two of the layers."""
    return {name: Layer.make(1, LAYERS[name][1], 1.0, seed, mean=0.5).statistics(512, seed) for name in ("up", "down")}


@pytest.fixture
def source(tmp_path):
    """An open file of `tensors`."""
    save_file(tensors(), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as opened:
        yield opened


def planned(source, spec="int8", statistics=None, **options):
    """A plan for all of them."""
    return make_plan(source, spec, preset="none", statistics=statistics, **options)


def bits(x: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("spec", ["int8", "nvfp4", "fp8_e4m3(granularity=block)", "svdquant_w4a4(rank=4)"])
def test_parts_and_bias_are_those_of_the_solver(source, tmp_path, spec):
    """The file holds what `solve` gives, bit for bit, and biases that are the true ones plus the correction."""
    only = {"keep": ["down"]} if spec.startswith("svdquant") else {}  # 96 columns are no whole groups of 64
    statistics = InMemory(known())
    plan = planned(source, spec, statistics, **only)
    convert(source, tmp_path / "out.safetensors", plan, statistics=statistics, jobs=1)
    out, before = load_file(tmp_path / "out.safetensors"), tensors()
    with open_source(tmp_path / "out.safetensors") as converted:
        held = look_for_layers(converted, converted.components[0])
        loaded = {name: held.load(stored) for name, stored in held.layers.items()}

    for tensor in plan.tensors():
        if tensor.action != "quantize":
            continue
        has_bias = f"{tensor.layer}.bias" in before
        expected = solve(before[tensor.key], tensor.fmt, tensor.solver, known().get(tensor.layer), has_bias=has_bias)
        for part, value in expected.parts.items():
            assert bits(loaded[tensor.layer][part]) == bits(value), part
        if expected.bias is not None:
            assert tensor.layer == "up"
            torch.testing.assert_close(out["up.bias"], before["up.bias"] + expected.bias, rtol=0, atol=1e-7)
            assert not torch.equal(out["up.bias"], before["up.bias"])
    assert torch.equal(out["unknown.bias"], before["unknown.bias"])
    assert "down.bias" not in out


def test_the_report_says_what_was_run_and_gained(source, tmp_path):
    """Each layer has its pipeline, its note, and the errors of it and of rounding; None where nothing is known."""
    statistics = InMemory(known())
    plan = planned(source, "int8", statistics)
    report = convert(source, tmp_path / "out.safetensors", plan, statistics=statistics)
    layers = {layer.layer: layer for layer in report.layers}

    assert layers["up"].solver == "scale_search+gptq+descent+bias"
    assert layers["down"].solver == "scale_search+gptq+descent"
    assert layers["unknown"].solver == "rtn"
    for name in ("up", "down"):
        assert 0 < layers[name].error < layers[name].unseen_error < 0.8 * layers[name].rtn_error
        assert layers[name].note == ""
    assert (layers["unknown"].error, layers["unknown"].rtn_error) == (None, None)
    entry = next(layer for layer in report.to_json()["layers"] if layer["layer"] == "up")
    assert {"solver", "note", "error", "rtn_error", "unseen_error"} <= entry.keys()


@pytest.fixture
def counted(monkeypatch):
    """Of every conversion from now on, which ends before it begins: the memory of its pieces by their names."""
    found = []

    def look(_, __, pieces, *more, **options):
        found.append({piece.name: piece.memory for piece in pieces})
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[convert.__module__], "rewrite", look)
    return found


def test_gradients_have_room(source, tmp_path, counted):
    """A layer whose gradients are known counts as what they take more, so that no more are solved at a time."""
    for outputs in (None, torch.eye(96)):
        statistics = InMemory({**known(), "up": replace(known()["up"], output_hessian=outputs)})
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out.safetensors", planned(source, "int8", statistics), statistics=statistics)

    without, given = counted
    assert given["up.weight"] - without["up.weight"] == 4 * (6 * 96 * 96 + 4 * 96 * 64)
    assert given["down.weight"] == without["down.weight"]


def test_second_moments_have_room_whatever_the_solver(source, tmp_path, counted):
    """Those that nothing is refined with are read too: results are judged on them. Vectors are nothing to count."""
    diagonal = {name: one.of_channels for name, one in known().items()}
    for by_layer in (known(), diagonal):
        statistics = InMemory(by_layer)
        plan = planned(source, "int8", statistics, solver="scale_search")
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out.safetensors", plan, statistics=statistics)

    full, vectors = counted
    assert full["down.weight"] - vectors["down.weight"] >= 4 * 6 * 96 * 96
    assert full["unknown.weight"] == vectors["unknown.weight"]


def test_a_layer_that_lost_says_so(source, tmp_path):
    """Where the refinement is worse on the other half, the report has less than was planned, and why."""
    broken = known()
    flip = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    broken["up"] = replace(broken["up"], held_out=broken["up"].hessian * torch.outer(flip, flip))
    statistics = InMemory(broken)
    plan = planned(source, "int8(rotation=0)", statistics)
    report = convert(source, tmp_path / "out.safetensors", plan, statistics=statistics)

    up = next(layer for layer in report.layers if layer.layer == "up")
    assert up.solver in ("rtn", "scale_search+bias")
    assert "lost" in up.note
    assert up.error <= up.rtn_error


@pytest.mark.parametrize("spec", ["fp8_e4m3({})", "fp8_e5m2({}granularity=row)", "nvfp4({})", "int8({}rotation=0)"])
def test_a_quantized_file_gets_scales_of_its_inputs_and_keeps_its_codes(source, tmp_path, spec):
    """Converting again to the same format with input_scale=true, by rounding to nearest, changes no code.

    Scales may differ in the last bit of a float32.
    """
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = tmp_path / "a" / "m.safetensors", tmp_path / "b" / "m.safetensors"
    plain = spec.format("").replace("()", "")
    convert(source, first, planned(source, plain, only=["up", "down"], solver="rtn"))
    counted = {
        name: replace(found, magnitudes=torch.bincount(torch.tensor([1020, 1021]), minlength=4096))
        for name, found in known().items()
    }
    with open_source(first) as quantized:
        wanted = spec.format("input_scale=true" if "({})" in spec else "input_scale=true,")
        plan = planned(quantized, wanted, InMemory(counted), only=["up", "down"], solver="rtn", requantize=True)
        convert(quantized, second, plan, statistics=InMemory(counted))
    before, after = load_file(first), load_file(second)

    assert after.keys() - before.keys() == {"up.input_scale", "down.input_scale"}
    for key, tensor in before.items():
        if key.endswith("scale_2") or (key.endswith("scale") and tensor.dtype == torch.float32):
            torch.testing.assert_close(after[key], tensor, rtol=2.0**-23, atol=0)
        elif not key.endswith("comfy_quant"):
            assert bits(after[key]) == bits(tensor), key


def test_layers_without_statistics_are_solved_without(source):
    """The plan gives each layer the solver for what is known of it, and its notes say which for which reason."""
    plan = planned(source, "nvfp4", InMemory(known()))
    picked = {tensor.layer: tensor.solver for tensor in plan.tensors() if tensor.action == "quantize"}

    assert picked == {
        "up": "scale_search+gptq+descent+bias",
        "down": "scale_search+gptq+descent",
        "unknown": "scale_search",
    }
    assert any("scale_search (auto: the default of nvfp4 without calibration data)" in note for note in plan.notes)
    assert any("second moments of the input are known" in note for note in plan.notes)


@pytest.mark.parametrize("given", [None, InMemory({}), InMemory({"up": Statistics(torch.ones(64), 10)})])
def test_a_plan_that_needs_statistics_is_refused_without(source, tmp_path, given):
    """Without them, or with those of other layers, a PlanError names the layer; nothing at all is written."""
    plan = planned(source, "int8", InMemory(known()), keep=["unknown"])
    before = files_below(tmp_path)

    with pytest.raises(PlanError, match=r"'(up|down)': .*needs second moments .*--stats"):
        convert(source, tmp_path / "out.safetensors", plan, statistics=given)
    assert files_below(tmp_path) == before


def test_statistics_of_another_shape_leave_no_target(source, tmp_path):
    """Statistics that do not fit a layer are an error that names it, and no file appears."""
    statistics = InMemory({**known(), "up": known()["down"]})
    plan = planned(source, "int8", statistics)

    with pytest.raises(SolverError, match=r"'up': the statistics are for K = 96, the weight has K = 64"):
        convert(source, tmp_path / "out.safetensors", plan, statistics=statistics)
    assert not (tmp_path / "out.safetensors").exists()


def interrupted(monkeypatch, source, target, plan, statistics) -> None:
    """Convert until the second layer."""
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(convert_layer, "solve", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, plan, statistics=statistics, jobs=1)


def test_a_resumed_run_gives_the_same_bytes(source, tmp_path, monkeypatch):
    """What an interrupted run has done is used, its report too, and the file is that of a run in one go."""
    statistics = InMemory(known())
    plan = planned(source, "int8", statistics)
    whole = convert(source, tmp_path / "whole.safetensors", plan, statistics=statistics)
    interrupted(monkeypatch, source, tmp_path / "out.safetensors", plan, statistics)
    report = convert(source, tmp_path / "out.safetensors", plan, statistics=InMemory(known()))

    assert report.resumed == 1
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [(layer.layer, layer.solver, layer.note, layer.error) for layer in report.layers] == [
        (layer.layer, layer.solver, layer.note, layer.error) for layer in whole.layers
    ]


@pytest.mark.parametrize("field", ["hessian", "held_out", "mean", "tokens", "samples"])
def test_other_statistics_begin_anew(source, tmp_path, monkeypatch, field):
    """A run goes on with the same statistics only: a change of any of them uses nothing of the partial result."""
    statistics = InMemory(known())
    plan = planned(source, "int8", statistics)
    interrupted(monkeypatch, source, tmp_path / "out.safetensors", plan, statistics)
    changed = known()
    value = getattr(changed["up"], field)
    other = torch.ones(4, 64) if value is None else value + 1
    changed["up"] = replace(changed["up"], **{field: other})
    report = convert(source, tmp_path / "out.safetensors", plan, statistics=InMemory(changed))

    assert report.resumed == 0


class Small(torch.nn.Module):
    """A model whose linears are named as in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x):
        """Two linears."""
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def calibrated(tmp_path):
    """A model, its file, and the file of its statistics."""
    model = Small()
    save_file({name: value.detach().clone() for name, value in model.named_parameters()}, tmp_path / "m.safetensors")
    root = Layer.make(1, 64, 1.0)
    batches = [root.samples(256, seed).float() + 0.2 for seed in range(8)]
    calibrate(model, batches).save(tmp_path / "stats.safetensors")
    return model, tmp_path / "m.safetensors", tmp_path / "stats.safetensors"


def command(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_takes_a_file_of_statistics(calibrated, tmp_path):
    """From calibrating a module to a converted file: layers are refined, and outputs come nearer than rounded ones."""
    model, file, stats = calibrated
    options = ["--format", "int8(rotation=0)", "--preset", "none"]
    code, out, err = command("convert", file, "-o", tmp_path / "out.safetensors", "--stats", stats, *options, "--json")
    assert code == 0, err
    layers = {layer["layer"]: layer for layer in json.loads(out)["layers"]}
    assert {layer["solver"] for layer in layers.values()} == {"scale_search+gptq+descent+bias"}
    assert command("convert", file, "-o", tmp_path / "rtn.safetensors", "--solver", "rtn", *options)[0] == 0

    errors = []
    for name in ("out", "rtn"):
        converted = Small()
        with open_source(tmp_path / f"{name}.safetensors") as source:
            held = look_for_layers(source, source.components[0])
            state = {
                f"{layer}.weight": stored.format.dequantize(held.load(stored), stored.shape, torch.float32)
                for layer, stored in held.layers.items()
            }
        biases = {k: v for k, v in load_file(tmp_path / f"{name}.safetensors").items() if k.endswith("bias")}
        converted.load_state_dict(state | biases)
        unseen = Layer.make(1, 64, 1.0).samples(512, 99).float() + 0.2
        errors.append(float((converted(unseen) - model(unseen)).detach().square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_the_command_refuses_statistics_of_another_model(calibrated, tmp_path):
    """Layers that are missing or of another shape are listed; the exit code says so, and nothing is written."""
    _, _, stats = calibrated
    save_file({"up.weight": torch.randn(96, 128), "other.weight": torch.randn(64, 64)}, tmp_path / "other.safetensors")
    before = files_below(tmp_path)
    code, _, err = command(
        "convert", tmp_path / "other.safetensors", "-o", tmp_path / "out.safetensors", "--format", "int8",
        "--preset", "none", "--stats", stats,
    )  # fmt: skip

    assert code == 3
    assert "up" in err
    assert "down" in err
    assert files_below(tmp_path) == before
