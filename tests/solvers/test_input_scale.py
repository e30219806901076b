"""Static activation scales: percentiles of counted magnitudes, and what formats make of them."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import SolverError
from lowbit.formats import parse_spec
from lowbit.solvers import Statistics, input_scale, percentile, solve
from tests.support import gaussian


def counted(x: torch.Tensor, **more) -> Statistics:
    """Statistics with the magnitudes of x."""
    bins = torch.bincount((x.abs().contiguous().view(torch.int32) >> 19).flatten(), minlength=4096)
    return Statistics(magnitudes=bins, **more)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_percentiles_are_those_of_the_samples(fraction):
    """The percentile is within the width of half a bin, about 2 %, of the exact one."""
    x = gaussian(1000, 400) * 3.7
    exact = float(x.abs().flatten().kthvalue(int(fraction * x.numel())).values)

    assert percentile(counted(x), fraction) == pytest.approx(exact, rel=0.022)


def test_the_ends_are_those_of_the_samples():
    """Nothing lies beyond the largest bin; with absmax known, the top is exact."""
    x = torch.tensor([[0.5, -3.0], [1.0, 2.0]])

    assert percentile(counted(x), 1.0) == pytest.approx(3.0, rel=0.045)
    assert percentile(counted(x, absmax=x.abs().amax(0)), 1.0) == 3.0
    assert 0.49 < percentile(counted(x), 0.0) <= 0.5


def test_percentiles_never_fall():
    """A larger fraction never has a smaller percentile."""
    known = counted(gaussian(64, 64) ** 3)
    found = [percentile(known, i / 200) for i in range(201)]

    assert found == sorted(found)


@pytest.mark.parametrize(
    ("spec", "largest"), [("fp8_e4m3(input_scale=true)", 448), ("nvfp4(input_scale=true)", 2688),
                          ("int8(input_scale=true)", 127), ("fp8_e5m2(input_scale=true)", 57344)],
)  # fmt: skip
def test_solve_stores_the_scale(spec, largest):
    """The stored scale maps the percentile to the largest activation code, whatever the pipeline."""
    fmt, w, x = parse_spec(spec), gaussian(48, 64), gaussian(4096, 64)
    known = counted(x, hessian=x.t() @ x / 4096, tokens=4096)
    for name in ("rtn", "scale_search+gptq", "auto"):
        solution = solve(w, fmt, name, known)
        fmt.check(solution.parts, (48, 64))
        assert float(solution.parts["input_scale"]) == pytest.approx(percentile(known, 0.9999) / largest, rel=1e-6)


def test_a_scaled_or_rotated_input_is_measured_as_the_kernel_gets_it():
    """With a pre-quant scale or a rotation the percentile is that of the changed samples."""
    x = gaussian(2048, 64) * torch.linspace(0.01, 4, 64)
    known = counted(x, hessian=x.t() @ x / 2048, tokens=2048, samples=x)
    fmt = parse_spec("fp8_e4m3(pre_quant_scale=true,input_scale=true)")
    parts = solve(gaussian(48, 64), fmt, "awq", known).parts
    exact = (x * parts["pre_quant_scale"].float()).abs().flatten().kthvalue(int(0.9999 * x.numel())).values

    assert float(parts["input_scale"]) * 448 == pytest.approx(float(exact), rel=0.05)
    rotating = parse_spec("int8(rotation=16,input_scale=true)")
    exact = rotating.prepare(x).abs().flatten().kthvalue(int(0.9999 * x.numel())).values
    assert float(solve(gaussian(48, 64), rotating, "rtn", known).parts["input_scale"]) * 127 == pytest.approx(
        float(exact), rel=0.05
    )
    with pytest.raises(SolverError, match="no samples of its input were kept"):
        solve(gaussian(48, 64), rotating, "rtn", counted(x, hessian=known.hessian, tokens=1))


def test_a_given_scale_needs_no_statistics():
    """It is stored as it is, beside what the solver makes without it; with statistics it wins over the counted one."""
    w, fmt = gaussian(48, 64), parse_spec("fp8_e4m3(input_scale=true)")
    plain = solve(w, parse_spec("fp8_e4m3"), "rtn").parts
    for known in (None, counted(w)):
        parts = solve(w, fmt, "rtn", known, given_scale=0.25).parts
        assert float(parts.pop("input_scale")) == 0.25
        assert all(torch.equal(parts[name].float(), plain[name].float()) for name in plain)
    with pytest.raises(SolverError, match="mxfp8 has no static scale"):
        solve(w, parse_spec("mxfp8(input_scale=true)"), "rtn", given_scale=0.25)


def test_the_scale_covers_the_fraction_that_is_asked_for():
    """Of the elements that were counted."""
    w, known = gaussian(48, 64), counted(gaussian(512, 64))
    parts = solve(w, parse_spec("int8(rotation=0,input_scale=true)"), "rtn", known, fraction=0.9).parts
    assert float(parts["input_scale"]) == pytest.approx(percentile(known, 0.9) / 127, rel=1e-6)


def test_what_is_missing_is_named():
    """No statistics, no counts, a fraction out of range and a format without such a scale: one clear error each."""
    w, fmt = gaussian(48, 64), parse_spec("fp8_e4m3(input_scale=true)")
    with pytest.raises(SolverError, match=r"blocks.0: .*nothing is known of that; calibrate"):
        solve(w, fmt, "rtn", where="blocks.0")
    with pytest.raises(SolverError, match="were not counted"):
        solve(w, fmt, "rtn", Statistics(hessian=torch.ones(64), tokens=5))
    with pytest.raises(SolverError, match="is no fraction"):
        percentile(counted(w), 1.5)
    with pytest.raises(SolverError, match="awq_w4a16 has no static scale of activations"):
        solve(w, parse_spec("awq_w4a16(input_scale=true)"), "rtn", counted(w))
    with pytest.raises(SolverError, match="has no static scale"):
        input_scale(counted(w), parse_spec("mxfp8(input_scale=true)"))
