"""What holds for every solver, and which one is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import SolverError, WeightError
from lowbit.formats import Format, parse_spec
from lowbit.solvers import AUTO, Statistics, pick_solver, register_solver, solver, solvers
from tests.support import gaussian, sqnr
from tests.support.specs import SMALL_SPECS

FORMATS = [parse_spec(spec) for spec in SMALL_SPECS]


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    """Stop the iterative solvers early: what is tested here holds after any number of steps."""
    monkeypatch.setattr("lowbit.solvers.learned_rounding.ITERATIONS", 8)


@pytest.fixture(params=sorted(solvers().keys() - {"awq"}))
def name(request) -> str:
    """Each registered solver that works without statistics."""
    return request.param


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_parts_are_those_of_the_format(name, fmt):
    """Every solver gives parts that pass the format's own check and decode close to the weight."""
    w = gaussian(96, 128)
    parts = solver(name)(w, fmt)

    fmt.check(parts, (96, 128))
    assert sqnr(w, fmt.dequantize(parts, (96, 128), torch.float32)) > 15


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_weight_that_is_not_finite_is_refused_by_name(name, fmt):
    """NaN and infinity give an error with the layer's name from every solver and format."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = gaussian(64, 128)
        w[63, 127] = bad
        with pytest.raises(WeightError, match=r"blocks\.3: holds NaN or infinity"):
            solver(name)(w, fmt, where="blocks.3")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_stay_zeros(name, fmt):
    """A weight of zeros decodes to zeros whatever the solver."""
    parts = solver(name)(torch.zeros(64, 128), fmt)

    assert torch.equal(fmt.dequantize(parts, (64, 128), torch.float32), torch.zeros(64, 128))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.stochastic], ids=str)
def test_a_seed_makes_rounding_stochastic_and_repeatable(name, fmt):
    """One seed gives the same codes twice, and others than another seed."""
    w = gaussian(64, 128)
    codes = [solver(name)(w, fmt, seed=seed)["qdata"].view(torch.uint8) for seed in (1, 1, 2)]

    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_auto_takes_what_the_format_states(fmt):
    """`auto` gives a registered solver and says of which format it is the default."""
    name, why = pick_solver(AUTO, fmt)

    assert name == fmt.data_free_solver
    assert name in solvers()
    assert fmt.name in why


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("fp8_e4m3", "rtn"), ("int8", "rtn"), ("mxfp8", "rtn"), ("nvfp4", "scale_search"), ("awq_w4a16", "scale_search"),
     ("mxfp4", "scale_search"), ("svdquant_w4a4", "scale_search")],
)  # fmt: skip
def test_auto_searches_scales_for_four_bits_only(spec, expected):
    """8-bit formats are rounded, 4-bit ones get a scale search."""
    assert pick_solver(AUTO, parse_spec(spec))[0] == expected


def test_a_named_solver_is_taken():
    """A name other than auto is taken as it is; one that does not exist is an error that lists the known ones."""
    assert pick_solver("rtn", parse_spec("nvfp4"))[0] == "rtn"
    with pytest.raises(SolverError, match=r"unknown solver 'gradient'; known solvers: .*rtn, scale_search"):
        pick_solver("gradient", parse_spec("nvfp4"))


def test_a_name_is_registered_once():
    """A second solver under a known name is refused."""
    with pytest.raises(SolverError, match="'rtn' is registered already"):
        register_solver("rtn")(solver("rtn"))


def test_statistics_give_column_weights():
    """The column weights are the diagonal of H, given whole or as a vector; without H there are none."""
    h = torch.diag(torch.tensor([1.0, 4.0])) + 0.5

    assert torch.equal(Statistics(hessian=h).column_weights(2), torch.tensor([1.5, 4.5]))
    assert torch.equal(Statistics(hessian=h.diagonal()).column_weights(2), torch.tensor([1.5, 4.5]))
    assert Statistics(absmax=torch.ones(2)).column_weights(2) is None


@pytest.mark.parametrize(
    ("hessian", "complaint"),
    [(torch.ones(3), "for K = 3, the weight has K = 2"), (torch.tensor([1.0, -1.0]), "negative or non-finite"),
     (torch.tensor([1.0, float("nan")]), "negative or non-finite")],
)  # fmt: skip
def test_statistics_of_another_layer_are_refused(hessian, complaint):
    """Second moments of the wrong length or with impossible values are an error that names the layer."""
    with pytest.raises(SolverError, match=f"blocks.1: .*{complaint}"):
        Statistics(hessian=hessian).column_weights(2, "blocks.1")


@pytest.mark.parametrize("width", [1, 3, 4096])
def test_samples_of_another_layer_are_refused(width):
    """Rows of another width, which nothing may read as if they had K values; and values that are not finite."""
    known = Statistics(hessian=torch.eye(2), tokens=9, samples=torch.ones(5, width))
    with pytest.raises(SolverError, match=rf"blocks.1: .*samples of shape \[5, {width}\], expected \[5, 2\]"):
        known.check(3, 2, "blocks.1")
    broken = replace(known, samples=torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(SolverError, match=r"blocks.1: .*samples with NaN"):
        broken.check(3, 2, "blocks.1")
    replace(known, samples=torch.ones(0, 2)).check(3, 2, "blocks.1")


@pytest.mark.parametrize("name", ["rtn", "scale_search"])
def test_solver_output_does_not_depend_on_the_number_of_threads(name):
    """A solver without matrix products gives the same bits on one thread and on several."""
    fmt: Format = parse_spec("nvfp4")
    w = gaussian(300, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = solver(name)(w, fmt)
        torch.set_num_threads(2)
        shared = solver(name)(w, fmt)
    finally:
        torch.set_num_threads(before)

    assert all(
        torch.equal(alone[part].view(-1).view(torch.uint8), shared[part].view(-1).view(torch.uint8)) for part in alone
    )
