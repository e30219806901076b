"""Layers are measured by what their outputs lose; what was measured is kept in a file."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowbit.calibration import calibrate
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.mixed_precision import find_choices
from lowbit.checkpoint.sensitivity import PLANNED, Measured, Sensitivities, measure, sample_rows
from lowbit.checkpoint.source import open_source
from lowbit.errors import PlanError, SolverError, WeightError
from lowbit.formats import get_format, parse_spec
from lowbit.solvers import solve
from lowbit.solvers.curvature import output_error
from tests.support.sensitivities import SPECS, errors_of, measured, statistics_of, with_gradients

HEAD = '{"lowbit_sensitivities": 1, "source": "", "statistics": "", "rows": 1'


@pytest.fixture
def selection(source):
    """Its measured choices."""
    return measured(source)


def test_the_error_is_that_of_the_weight_without_statistics(source, selection):
    """Each error is the squared error of the rounded weight over its squares; staying costs nothing."""
    w = source.read("", "blocks.1.up.weight")

    found = errors_of(selection, "blocks.1.up")

    assert found.keys() == {*SPECS, "as it is"}
    assert found["as it is"] == 0
    for spec in SPECS:
        fmt = parse_spec(spec)
        error = fmt.dequantize(fmt.quantize(w), tuple(w.shape), torch.float32) - w.float()
        assert found[spec] == pytest.approx(float(error.square().sum() / w.float().square().sum()), rel=1e-4)


def test_with_statistics_it_is_that_of_the_output_on_the_half_held_out(source):
    """tr(E H E^T) / tr(W H W^T) with H of the half that solvers do not see."""
    known = statistics_of(128)
    w = source.read("", "blocks.0.up.weight")
    fmt = get_format("nvfp4")()

    found = errors_of(measured(source, ("nvfp4",), InMemory({"blocks.0.up": known})), "blocks.0.up")

    lost, signal = output_error(w, fmt, fmt.quantize(w), known.held_out)
    assert found["nvfp4"] == pytest.approx(lost / signal, rel=1e-5)
    plain, plain_signal = output_error(w, fmt, fmt.quantize(w), None)
    assert lost / signal != pytest.approx(plain / plain_signal, rel=0.01)


def test_the_whole_pipeline_can_be_measured(source):
    """`PLANNED` gives the error that converting will report, and the solver that the plan names."""
    known = InMemory({"blocks.0.up": statistics_of(128)})
    found = find_choices(source, ("nvfp4",), preset="none", only=[r"blocks\.0\.up"], statistics=known)

    errors = measure(source, found.candidates, known, measure_with=PLANNED, rows=0)

    solver = found.layers[0].choices[0].plan.solver
    w = source.read("", "blocks.0.up.weight")
    solution = solve(w, get_format("nvfp4")(), solver, known.get("blocks.0.up"), has_bias=True)
    assert "gptq" in solver
    assert errors.get("blocks.0.up", "nvfp4", solver) == pytest.approx(solution.unseen_error, rel=1e-4)


@pytest.mark.parametrize("spec", ["nvfp4", "fp8_e4m3", "int8(granularity=tensor)", "fp8_e4m3(granularity=block)"])
def test_some_rows_stand_for_all(tmp_path, spec):
    """The error on 256 of 2048 rows is within 5 % of that on all, also where all rows share one scale."""
    w = torch.randn((2048, 256), generator=torch.Generator().manual_seed(0))
    w[777] *= 4
    save_file({"a.weight": w}, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source:
        candidates = find_choices(source, (spec,), preset="none").candidates
        some = measure(source, candidates, measure_with="rtn", rows=256)
        every = measure(source, candidates, measure_with="rtn", rows=0)

    assert some.get("a", spec, "rtn") == pytest.approx(every.get("a", spec, "rtn"), rel=0.05)
    assert some.get("a", spec, "rtn") != every.get("a", spec, "rtn")


def test_a_sample_is_spread_and_has_the_largest_row():
    """Whole pieces from the first to the last, in order, the largest value among them; a small weight is not cut."""
    w = torch.arange(1000.0).unsqueeze(1).expand(1000, 4).clone()
    w[500] = -5000

    rows = sample_rows(w, 64, 16)[:, 0]

    assert rows.numel() <= 80
    assert rows[0] == 0
    assert 999 in rows
    assert -5000 in rows
    assert sample_rows(w, 1000, 16) is w


def test_low_rank_formats_get_all_rows(source):
    """A low-rank branch fits few rows better than many, so it is measured on all of them."""
    spec = "svdquant_w4a4(rank=4)"
    candidates = find_choices(source, (spec,), preset="none").candidates

    some, every = (measure(source, candidates, measure_with="rtn", rows=rows) for rows in (16, 0))

    assert some.layers == every.layers


# ---- what cannot be done --------------------------------------------------------------------------------------------


def test_a_broken_weight_is_named(tmp_path):
    """A weight that is not finite stops the measuring, with its layer's name."""
    weight = torch.ones(64, 128)
    weight[3, 5] = float("nan")
    save_file({"a.weight": weight}, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source:
        candidates = find_choices(source, ("nvfp4",), preset="none").candidates
        with pytest.raises(WeightError, match="layer 'a': holds NaN"):
            measure(source, candidates)


def test_a_solver_that_needs_statistics_is_refused_without(source):
    """Measuring with gptq takes second moments, and the message says what to do."""
    candidates = find_choices(source, ("nvfp4",), preset="none").candidates

    with pytest.raises(SolverError, match="needs second moments"):
        measure(source, candidates, measure_with="scale_search+gptq")


# ---- keeping what was measured --------------------------------------------------------------------------------------


def test_what_is_known_is_not_measured_again(source, tmp_path):
    """From a file come the errors of before, as they are; only formats that it lacks are measured."""
    candidates = find_choices(source, SPECS, preset="none").candidates
    first = measure(source, candidates[:2], measure_with="rtn")
    name = candidates[1].name
    first.layers[name]["nvfp4"] = Measured("rtn", 0.125)
    first.save(tmp_path / "s.json")
    seen = []

    again = measure(
        source,
        candidates,
        measure_with="rtn",
        known=Sensitivities.load(tmp_path / "s.json"),
        progress=lambda *told: seen.append(told[2]),
    )

    assert again.get(name, "nvfp4", "rtn") == 0.125
    assert set(seen) == {candidate.name for candidate in candidates[2:]}
    assert again.layers.keys() == {candidate.name for candidate in candidates}
    other = measure(source, candidates[1:2], measure_with="scale_search", known=again)
    assert other.get(name, "nvfp4", "scale_search") != 0.125


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "x"}, "another checkpoint"),
        ({"statistics": "x"}, "other statistics"),
        ({"rows": 7}, "7 rows a layer"),
    ],
)
def test_errors_of_something_else_are_refused(source, change, message):
    """Another checkpoint, other statistics or another sample: the message says which."""
    candidates = find_choices(source, SPECS, preset="none").candidates
    known = dataclasses.replace(Sensitivities(source.fingerprint()), **change)

    with pytest.raises(PlanError, match=message):
        measure(source, candidates, known=known)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "no sensitivities of version 1"),
        (HEAD + "}", "damaged"),
        (HEAD + ', "layers": {"a": {"int8": ["rtn", -1]}}}', "the error of a as int8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    """One message with the file's name and what is wrong."""
    (tmp_path / "s.json").write_text(text)

    with pytest.raises(PlanError, match=message) as caught:
        Sensitivities.load(tmp_path / "s.json")
    assert "s.json" in str(caught.value)


def test_with_gradients_a_layer_counts_by_what_it_does_to_the_models_output(source):
    """The weight of a layer is tr(G W H W^T) of its tokens, by all rows, and its error that of the model's output."""
    known = with_gradients(source, {"blocks.0": 9.0})

    found = find_choices(source, SPECS, preset="none", statistics=known)
    errors = measure(source, found.candidates, known, measure_with="scale_search", rows=16)
    selection = found.with_errors(errors, "scale_search")

    assert selection.by_gradients
    w = source.read("", "blocks.0.up.weight").float()
    h = known.get("blocks.0.up").held_out
    tokens = known.get("blocks.0.up").total_tokens
    assert errors.weights["blocks.0.up"] == pytest.approx(tokens * 9 * float(((w @ h) * w).sum()), rel=1e-4)
    weights = {layer.name: layer.weight for layer in selection.layers}
    assert sum(weights.values()) == pytest.approx(len(weights))
    assert weights["blocks.0.up"] / weights["blocks.1.up"] == pytest.approx(
        errors.weights["blocks.0.up"] / errors.weights["blocks.1.up"]
    )
    fmt = parse_spec("nvfp4")
    solution = solve(w, fmt, "scale_search", known.get("blocks.0.up"))
    assert errors_of(selection, "blocks.0.up")["nvfp4"] == pytest.approx(solution.error, rel=1e-4)


def test_errors_of_layers_are_comparable(tmp_path):
    """Error times weight is the change of the model's output, for a layer of one token a sample as for one of fifty."""

    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, c):
            return self.outer(torch.tanh(self.inner(x)) * (1 + torch.tanh(self.scale(c))).unsqueeze(1))

    torch.manual_seed(0)
    model, data = Modulated(), [(torch.randn(8, 50, 64), torch.randn(8, 64)) for _ in range(24)]
    known = calibrate(model, data, gradients=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    spec = "awq_w4a16(group_size=32)"
    with open_source(tmp_path / "model.safetensors") as opened, torch.no_grad():
        found = find_choices(opened, [spec], preset="none", statistics=known)
        errors = measure(opened, found.candidates, known, measure_with="rtn", rows=0)
        for name in ("scale", "inner", "outer"):
            changed = copy.deepcopy(model)
            fmt, weight = parse_spec(spec), changed.get_submodule(name).weight
            weight.copy_(fmt.dequantize(fmt.quantize(weight), tuple(weight.shape), torch.float32))
            cost = sum(float((changed(*batch) - model(*batch)).square().sum()) for batch in data)
            predicted = errors.get(name, spec, "rtn") * errors.weights[name]
            assert predicted == pytest.approx(cost, rel=0.25)


def test_weights_are_saved_with_the_errors(source, tmp_path):
    """A file of sensitivities holds the weights; a damaged one is refused."""
    known = with_gradients(source, {})
    candidates = find_choices(source, SPECS, preset="none", statistics=known).candidates
    errors = measure(source, candidates, known, measure_with="rtn", rows=0)
    errors.save(tmp_path / "s.json")

    again = measure(
        source, candidates, known, measure_with="rtn", rows=0, known=Sensitivities.load(tmp_path / "s.json")
    )

    assert again.weights == errors.weights
    assert len(again.weights) == len(candidates)
    text = (tmp_path / "s.json").read_text()
    (tmp_path / "s.json").write_text(text.replace('"weights": {', '"weights": {"a": -1.0, '))
    with pytest.raises(PlanError, match="the weight of a"):
        Sensitivities.load(tmp_path / "s.json")
