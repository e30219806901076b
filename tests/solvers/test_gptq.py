"""gptq gains what the theory says it gains, in the best order, and says of which layer an H is unusable."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.solvers import Statistics, base, refinements, solve, solver
from lowbit.solvers.curvature import Curvature, output_error, second_moments
from lowbit.solvers.refinement import Unrefined, refine
from tests.support import gaussian
from tests.support.layers import Layer, power_law

SPECS = [
    "int8",
    "fp8_e4m3(granularity=row)",
    "awq_w4a16",
    "nvfp4",
    "nvfp4(row_global_scale=true)",
    "mxfp4",
    "mxfp8",
    "int8(rotation=64)",
    "fp8_e4m3",
]


def rounded(w: Tensor, fmt: Format, hessian: Tensor, *steps: str) -> Parts:
    """Round to nearest, then run refinements with H as it is."""
    start = solver("rtn")(w, fmt)
    return refine(Unrefined(w, fmt, start, hessian, 0.0), [refinements()[step] for step in steps]) if steps else start


def error(w: Tensor, fmt: Format, parts: Parts, hessian: Tensor) -> float:
    """tr(E H E^T) in float64."""
    missed = (fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32) - w).double()
    return float(((missed @ hessian.double()) * missed).sum())


def theory(hessian: Tensor) -> float:
    """10 log10(tr H / tr D) in dB for H = L D L^T with columns by rising H_kk."""
    order = hessian.diagonal().argsort()
    pivots = torch.linalg.cholesky(hessian[order][:, order].double()).diagonal().square()
    return 10 * math.log10(float(hessian.double().trace() / pivots.sum()))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("k", "alpha", "least"), [(256, 0.5, 0.6), (512, 0.5, 0.6), (256, 1.0, 3.4), (512, 1.0, 3.8)])
def test_the_gain_is_the_theoretical_one(spec, k, alpha, least):
    """On power-law spectra the error falls by 10 log10(tr H / tr D), within 0.2 dB: the sharp test of the whole."""
    layer, fmt = Layer.make(256, k, alpha), parse_spec(spec)
    h, w = layer.hessian, layer.weight

    gain = 10 * math.log10(error(w, fmt, rounded(w, fmt, h), h) / error(w, fmt, rounded(w, fmt, h, "gptq"), h))

    assert theory(h) > least
    assert gain == pytest.approx(theory(h), abs=0.2)


@pytest.mark.parametrize("spec", SPECS)
def test_solving_from_samples_gains_nearly_as_much(spec):
    """`rtn+gptq` on 16 samples a channel, shrunk and judged, is within 0.7 dB of the theory for the exact H."""
    layer, fmt = Layer.make(256, 256, 1.0), parse_spec(spec)
    found = solve(layer.weight, fmt, "rtn+gptq", layer.statistics(8 * 256))
    h, w = layer.hessian, layer.weight

    gain = 10 * math.log10(error(w, fmt, rounded(w, fmt, h), h) / error(w, fmt, found.parts, h))

    assert found.solver == "rtn+gptq"
    assert gain == pytest.approx(theory(h), abs=0.7)


@pytest.mark.parametrize("spec", SPECS)
def test_without_correlation_it_is_rounding_to_nearest(spec):
    """For a diagonal H no column can make up for another: the codes are those of rounding to nearest."""
    w, fmt = gaussian(32, 192), parse_spec(spec.replace("rotation=64", "rotation=0"))
    h = torch.diag(torch.rand(192) + 0.1)

    values = [
        fmt.dequantize(parts, (32, 192), torch.float32) for parts in (rounded(w, fmt, h, "gptq"), rounded(w, fmt, h))
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("spec", ["int8", "nvfp4", "awq_w4a16"])
def test_white_samples_cost_nothing_beyond_noise(spec):
    """When H = I is seen through few samples, what is kept loses less than 0.05 dB against rounding to nearest."""
    layer, fmt = Layer.make(128, 128, 0.0), parse_spec(spec)
    found = solve(layer.weight, fmt, "rtn+gptq", layer.statistics(512))

    plain = rounded(layer.weight, fmt, layer.hessian)
    lost = error(layer.weight, fmt, found.parts, layer.hessian) / error(layer.weight, fmt, plain, layer.hessian)
    assert 10 * math.log10(lost) < 0.05


def by_definition(w: Tensor, step: Tensor, hessian: Tensor) -> Tensor:
    """LDLQ for int8 rows in float64, one column at a time: codes [n, K]."""
    order = hessian.diagonal().argsort()
    h = hessian.double()[order][:, order]
    root = torch.linalg.cholesky(h)
    lower = root / root.diagonal()
    x, error = w.double()[:, order], torch.zeros_like(w, dtype=torch.float64)
    codes = torch.zeros_like(error)
    for j in reversed(range(w.shape[1])):
        wanted = x[:, j] + error[:, j + 1 :] @ lower[j + 1 :, j]
        codes[:, j] = (wanted / step[:, 0].double()).round().clamp(-127, 127)
        error[:, j] = x[:, j] - codes[:, j] * step[:, 0].double()
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 200])
def test_it_is_the_definition_in_blocks(k):
    """For sizes around that of a block, nearly all codes are those of the textbook form in float64."""
    w, fmt, size = gaussian(200, k), parse_spec("int8"), torch.rand(k) + 1
    h = (torch.full((k, k), 0.9) + 0.1 * torch.eye(k)) * torch.outer(size, size)  # every column feels every other
    parts = rounded(w, fmt, h, "gptq")
    expected = by_definition(w, parts["scale"], h)

    assert (parts["qdata"].double() == expected).double().mean() > 0.995  # a tie may fall the other way in float32


def test_the_order_of_the_columns_in_the_file_does_not_matter():
    """Permuting the channels permutes the codes: the order of rounding follows H alone."""
    layer, fmt = Layer.make(64, 160, 1.0), parse_spec("int8")
    shuffled = torch.randperm(160)
    one = rounded(layer.weight, fmt, layer.hessian, "gptq")["qdata"]
    other = rounded(layer.weight[:, shuffled], fmt, layer.hessian[shuffled][:, shuffled], "gptq")["qdata"]

    assert (one[:, shuffled] == other).double().mean() > 0.995


def test_large_channels_go_first():
    """The order has rising H_kk, so that the last column, rounded first, has the largest; L fits it."""
    h = Layer.make(1, 48, 1.0).hessian
    order, lower = Curvature(h, "w").factor
    sorted_h = h[order][:, order]

    assert torch.equal(order.sort().values, torch.arange(48))
    assert (sorted_h.diagonal().diff() >= 0).all()
    assert torch.equal(lower.diagonal(), torch.ones(48))
    assert torch.equal(lower, lower.tril())
    pivots = torch.linalg.cholesky(sorted_h.double()).diagonal().square()
    torch.testing.assert_close((lower.double() * pivots) @ lower.double().t(), sorted_h.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "nvfp4", "awq_w4a16", "svdquant_w4a4(rank=4)"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_fewer_samples_than_channels_work(spec, tokens):
    """A singular H is shrunk into a regular one; what comes out is finite and no worse than rounding to nearest."""
    layer, fmt = Layer.make(32, 128, 1.0), parse_spec(spec)
    found = solve(layer.weight, fmt, "auto", layer.statistics(tokens))

    assert found.error <= found.rtn_error
    assert fmt.dequantize(found.parts, (32, 128), torch.float32).isfinite().all()


@pytest.mark.parametrize("live", [40, 0])
@pytest.mark.parametrize(
    "spec", ["int8", "fp8_e4m3", "fp8_e5m2", "mxfp8", "nvfp4", "awq_w4a16", "svdquant_w4a4(rank=4)"]
)
def test_dead_channels_and_dead_inputs_work(spec, live):
    """Channels without any input are stored finite; where the whole input was zero, as well as by rounding."""
    w, fmt = gaussian(32, 64), parse_spec(spec)
    h = torch.zeros(64, 64)
    h[:live, :live] = Layer.make(1, 64, 1.0).hessian[:live, :live]
    found = solve(w, fmt, "auto", Statistics(hessian=h, tokens=500, held_out=h, held_out_tokens=500))

    decoded = fmt.dequantize(found.parts, (32, 64), torch.float32)
    assert found.error <= found.rtn_error
    assert decoded.isfinite().all()
    if not live:
        plain = fmt.dequantize(rounded(w, fmt, h), (32, 64), torch.float32)
        assert (decoded - w).norm() <= 1.05 * (plain - w).norm()


def test_factors_fall_back_to_float64():
    """An H whose float32 Cholesky factor does not exist is factorized in float64."""
    k = 192
    h = (power := power_law(k, 0.0)) @ torch.diag((torch.arange(k) < k // 2).double() + 6e-8) @ power.t()
    h = ((h + h.t()) / 2).float()
    assert int(torch.linalg.cholesky_ex(h).info) > 0
    assert int(torch.linalg.cholesky_ex(h.double()).info) == 0

    order, lower = Curvature(h, "w").factor

    expected = torch.linalg.cholesky(h.double()[order][:, order])
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, (expected / expected.diagonal()).float())


def test_an_indefinite_matrix_is_not_refined_with():
    """What cannot be a second moment is an error with the layer's name from the factor; solve does without and says so.

    svdquant, whose low rank solves under H, takes the diagonal, too.
    """
    h = torch.full((64, 64), -1.0).fill_diagonal_(1.0)

    with pytest.raises(SolverError, match=r"blocks\.7: .*no positive definite matrix; calibrate it again"):
        _ = Curvature(h, "blocks.7").factor
    for spec in ("int8", "awq_w4a16", "svdquant_w4a4(rank=8)"):
        found = solve(gaussian(16, 64), parse_spec(spec), "auto", Statistics(hessian=h, tokens=99), where="blocks.7")
        assert "gptq" not in found.solver
        assert found.note == (
            "judged on the samples it was made from: there are no others; only the diagonal was used: blocks.7: the "
            "second moments of its input are no positive definite matrix; calibrate it again"
        )
        assert found.solver == ("svdquant" if "svdquant" in spec else "scale_search")


def test_svdquant_that_loses_is_a_scale_search(monkeypatch):
    """What comes after it is not plain rounding at once, and that is said."""
    layer, fmt = Layer.make(64, 128, 1.0), parse_spec("svdquant_w4a4(rank=8)")

    def spoiled(*arguments, **options):
        parts = solver("scale_search")(*arguments, **options)
        return {**parts, "scale": parts["scale"] * 8}

    monkeypatch.setitem(base._REGISTRY, "svdquant", spoiled)
    found = solve(layer.weight, fmt, "svdquant", layer.statistics(512))

    assert found.solver == "scale_search"
    assert "svdquant was worse than rounding to nearest on the samples held out" in found.note
    assert found.error < found.rtn_error


GOOD = Layer.make(16, 64, 1.0).exact()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["hessian", "held_out", "mean"])
@pytest.mark.parametrize("place", ["diagonal", "corner"])
def test_statistics_that_are_not_finite_are_refused_by_name(bad, field, place):
    """One value that is no number, anywhere, is an error with the layer's name: no codes are made of it."""
    broken = getattr(GOOD, field).clone()
    broken[(3, 3) if place == "diagonal" and broken.dim() == 2 else (0, -1)[: broken.dim()]] = bad

    for name in ("auto", "rtn", "scale_search+descent"):
        with pytest.raises(SolverError, match=r"blocks\.7: the statistics hold .*; calibrate again"):
            solve(gaussian(16, 64), parse_spec("fp8_e4m3"), name, replace(GOOD, **{field: broken}), where="blocks.7")


@pytest.mark.parametrize(
    "changes",
    [{"hessian": torch.eye(32)}, {"held_out": torch.eye(32)}, {"held_out": torch.ones(64)}, {"mean": torch.ones(3)},
     {"hessian": torch.ones(64, 80)}, {"absmax": torch.ones(65)}],
    ids=lambda changes: next(f"{name}-{list(value.shape)}" for name, value in changes.items()),
)  # fmt: skip
def test_statistics_of_another_layer_are_refused_by_name(changes):
    """Any tensor of the wrong shape is an error that gives the layer and both shapes."""
    with pytest.raises(SolverError, match=r"blocks\.7: the statistics (are for K = 32|hold a .* expected \[64)"):
        solve(gaussian(16, 64), parse_spec("int8"), "auto", replace(GOOD, **changes), where="blocks.7")


def test_a_negative_diagonal_is_refused_by_name():
    """Negative second moments are an error with the layer's name."""
    h = GOOD.hessian.clone()
    h[5, 5] = -1e-3

    with pytest.raises(SolverError, match=r"blocks\.7: .*negative or non-finite second moments"):
        solve(gaussian(16, 64), parse_spec("int8"), "auto", replace(GOOD, hessian=h), where="blocks.7")


def test_shrinking_keeps_the_diagonal_and_scales_errors():
    """second_moments multiplies what is off the diagonal, puts H into the units of the factor, and is a copy."""
    h = Layer.make(1, 24, 1.0).hessian
    before, factor = h.clone(), torch.rand(24) + 0.5
    shrunk = second_moments(h, 0.25, factor)

    expected = (0.75 * h + 0.25 * torch.diag(h.diagonal())) * torch.outer(factor, factor)
    torch.testing.assert_close(shrunk, expected)
    assert torch.equal(h, before)


def test_output_errors_are_those_of_samples():
    """output_error is the mean squared error of the outputs on the samples H is from, and their mean square."""
    layer, fmt = Layer.make(24, 64, 1.0, mean=0.5), parse_spec("nvfp4")
    x = layer.samples(300)
    parts = rounded(layer.weight, fmt, layer.hessian)
    missed = fmt.dequantize(parts, (24, 64), torch.float32).double() - layer.weight.double()
    found = output_error(layer.weight, fmt, parts, (x.t() @ x / 300).float())

    expected = [float((x @ m.t()).square().sum() / 300) for m in (missed, layer.weight.double())]
    assert found == pytest.approx(expected, rel=1e-4)
