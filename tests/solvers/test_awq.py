"""Activation-aware scales: what they gain, that refinement goes on from them, and that files hold them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import PlanError, SolverError
from lowbit.formats import parse_spec
from lowbit.solvers import Statistics, solve, solver
from lowbit.solvers.curvature import output_error
from tests.support import gaussian
from tests.support.checkpoints import save_model

AWQ = parse_spec("awq_w4a16(pre_quant_scale=True)")


def uneven_input(k: int, seed: int = 9) -> torch.Tensor:
    """Samples [12288, K] with correlated channels of very different sizes."""
    mix = gaussian(k, k, seed=seed) * torch.arange(1, k + 1).float().pow(-0.4)
    return gaussian(12288, k, seed=seed + 1) @ mix.t() * gaussian(1, k, seed=seed + 2).exp()


def moments(x: torch.Tensor) -> torch.Tensor:
    """E[x x^T]."""
    return x.t() @ x / x.shape[0]


def statistics_of(x: torch.Tensor) -> Statistics:
    """Of the first two thirds of some samples."""
    first, second, _ = x.chunk(3)
    seen = torch.cat([first, second])
    return Statistics(
        hessian=moments(first), tokens=len(first), held_out=moments(second), held_out_tokens=len(second),
        mean=seen.mean(0), absmax=seen.abs().amax(0), samples=first[:256],
        magnitudes=torch.bincount((seen.abs().view(torch.int32) >> 19).flatten(), minlength=4096),
    )  # fmt: skip


@pytest.fixture(scope="module")
def case():
    """A weight, statistics of its input, and second moments of other samples."""
    x = uneven_input(128)
    return gaussian(96, 128), statistics_of(x), moments(x.chunk(3)[2])


def relative(w, fmt, parts, hessian) -> float:
    """The error of the output over the output."""
    lost, signal = output_error(w, fmt, parts, hessian)
    return lost / signal


@pytest.mark.parametrize("spec", ["awq_w4a16", "int8", "nvfp4"])
def test_it_beats_the_search_of_scales_alone(case, spec):
    """On input with channels of different sizes the error of the output falls below that of a weighted search."""
    w, statistics, unseen = case
    fmt, scaled = parse_spec(spec), parse_spec(f"{spec}(pre_quant_scale=True)")
    searched = solver("scale_search")(w, fmt, statistics)
    made = solver("awq")(w, scaled, statistics)

    scaled.check(made, (96, 128))
    assert relative(w, scaled, made, unseen) < 0.95 * relative(w, fmt, searched, unseen)


@pytest.mark.parametrize("spec", ["awq_w4a16", "nvfp4", "fp8_e4m3", "int8(rotation=16)"])
def test_refinement_goes_on_from_it(case, spec):
    """awq+gptq+descent keeps the scales that awq chose and lowers its error further, held out as well."""
    w, statistics, unseen = case
    fmt = parse_spec(spec.replace(")", ",pre_quant_scale=True)") if ")" in spec else f"{spec}(pre_quant_scale=True)")
    start = solver("awq")(w, fmt, statistics)
    refined = solve(w, fmt, "awq+gptq+descent", statistics)

    assert refined.solver == "awq+gptq+descent"
    assert torch.equal(refined.parts["pre_quant_scale"], start["pre_quant_scale"])
    assert relative(w, fmt, refined.parts, unseen) < 0.9 * relative(w, fmt, start, unseen)


def test_a_diagonal_is_enough(case):
    """With the second moments of single channels alone it still beats rounding by far."""
    w, statistics, unseen = case
    known = Statistics(hessian=statistics.diagonal, tokens=statistics.tokens)
    plain = AWQ.plain.quantize(w)

    assert relative(w, AWQ, solver("awq")(w, AWQ, known), unseen) < 0.7 * relative(w, AWQ.plain, plain, unseen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes_follow_the_source(case, dtype):
    """Every part has the dtype that a file reserves for a weight of this dtype."""
    w, statistics, _ = case
    parts = solver("awq")(w.to(dtype), AWQ, statistics)

    assert {name: part.dtype for name, part in parts.items()} == AWQ.part_dtypes(dtype)


def test_a_channel_that_sees_nothing_does_no_harm(case):
    """Dead channels get finite scales, and so does an input that is nothing but zeros."""
    w, statistics, _ = case
    hessian = statistics.hessian.clone()
    hessian[3] = hessian[:, 3] = 0
    for known in (Statistics(hessian=hessian, tokens=100), Statistics(hessian=torch.zeros(128), tokens=100)):
        parts = solver("awq")(w, AWQ, known)
        assert bool(parts["pre_quant_scale"].isfinite().all() & (parts["pre_quant_scale"] > 0).all())


def test_auto_takes_it_for_such_formats_only(case):
    """`auto` starts with awq where the format stores its scales, also when only a diagonal is known."""
    w, statistics, _ = case

    assert solve(w, AWQ, "auto", statistics).solver == "awq+gptq+descent"
    assert solve(w, AWQ, "auto", Statistics(hessian=statistics.diagonal, tokens=9)).solver == "awq"
    assert not solve(w, AWQ.plain, "auto", statistics).solver.startswith("awq")


def test_it_falls_back_to_plain_rounding(case):
    """Where the samples held out say the opposite of those it was made from, plain rounding is kept."""
    w, statistics, _ = case
    other = torch.diag(statistics.hessian.diagonal().reciprocal())
    wrong = Statistics(hessian=statistics.hessian, tokens=4096, held_out=other, held_out_tokens=4096)
    solution = solve(w, AWQ, "awq", wrong)

    assert solution.solver == "rtn"
    assert torch.equal(solution.parts["pre_quant_scale"].float(), torch.ones(128))
    assert solution.error == solution.rtn_error


@pytest.mark.parametrize("name", ["rtn", "scale_search+gptq"])
def test_other_starts_are_refused_for_such_formats(case, name):
    """Nothing else chooses the stored scales."""
    with pytest.raises(SolverError, match="start with awq"):
        solve(case[0], AWQ, name, case[1])


def test_it_is_refused_without_statistics_or_a_place(case):
    """Without second moments, or for a format that stores no scales, it says what to do."""
    w, statistics, _ = case
    with pytest.raises(SolverError, match=r"blocks.1: .*calibrate"):
        solver("awq")(w, AWQ, None, where="blocks.1")
    with pytest.raises(SolverError, match="calibrate"):
        solve(w, AWQ, "auto")
    with pytest.raises(SolverError, match="pre_quant_scale=true"):
        solve(w, AWQ.plain, "awq", statistics)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The layers of `save_model` that are quantized here."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128, bias=False)


@pytest.fixture
def calibrated(tmp_path):
    """An open checkpoint and statistics of the inputs of its first block."""
    known = {"blocks.0.up": statistics_of(uneven_input(128)), "blocks.0.down": statistics_of(uneven_input(192, 20))}
    with open_source(save_model(tmp_path / "in.safetensors")) as source:
        yield source, InMemory(known)


@pytest.mark.parametrize("spec", ["awq_w4a16(pre_quant_scale=true)", "fp8_e4m3(pre_quant_scale=true,input_scale=true)"])
def test_files_hold_the_scales(calibrated, tmp_path, spec):
    """A plan survives its file, conversion writes the scales, and a module loaded from it computes with them."""
    source, known = calibrated
    make_plan(source, spec, preset="none", only=["blocks.0"], statistics=known).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    report = convert(source, tmp_path / "out.safetensors", plan, statistics=known)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block().bfloat16()])
    load(model, tmp_path / "out.safetensors", strict=False)

    assert all(layer.solver.startswith("awq+gptq+descent") for layer in report.layers)
    weight, x = model.blocks[0].down.weight, uneven_input(192, 20)[:64].bfloat16()
    scale = weight.parts["pre_quant_scale"]
    assert float(scale.float().max() / scale.float().min()) > 2
    expected = x.float() @ weight.dequantize().float().t()
    torch.testing.assert_close(model.blocks[0].down(x).float(), expected, rtol=0.03, atol=0.03 * float(expected.std()))


def test_layers_without_statistics_are_refused_by_name(calibrated, tmp_path):
    """Planning and converting name the first layer whose input is not known."""
    source, known = calibrated
    spec = "awq_w4a16(pre_quant_scale=true)"
    with pytest.raises(PlanError, match=r"'blocks\.1\.\w+': .*no statistics of it"):
        make_plan(source, spec, preset="none", only=[r"blocks\.[01]\."], statistics=known)
    plan = make_plan(source, spec, preset="none", only=[r"blocks\.0\."], statistics=known)
    with pytest.raises(PlanError, match=r"'blocks\.0\.\w+': .*there are no statistics; calibrate"):
        convert(source, tmp_path / "out.safetensors", plan)
