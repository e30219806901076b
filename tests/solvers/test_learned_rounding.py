"""Learned rounding: its objective, that nothing it returns is worse by it, and what it is worth at the output."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import SolverError
from lowbit.formats import parse_spec
from lowbit.solvers import Statistics, parse_pipeline, solve, solver
from lowbit.solvers.curvature import output_error
from lowbit.solvers.learned_rounding import Projection, _Problem, projected_rank
from lowbit.solvers.learned_rounding_optimizers import OPTIMIZERS, AdamW, Polyak, Prodigy, RAdam
from tests.support import gaussian

NAMES = ["learned_rounding", *(f"learned_rounding_{name}" for name in OPTIMIZERS)]
SPECS = ["fp8_e4m3", "int8", "int8(rotation=16)", "mxfp8", "nvfp4", "awq_w4a16", "svdquant_w4a4"]
# Fewer singular vectors than the default, which is all of them for a weight as small as these.
RANK = 24


@pytest.fixture(autouse=True)
def few_vectors(monkeypatch):
    """Make the objective look at some singular vectors of a small weight only, and stop early."""
    monkeypatch.setattr("lowbit.solvers.learned_rounding.ITERATIONS", 60)
    monkeypatch.setattr("lowbit.solvers.learned_rounding.MIN_K", RANK)
    monkeypatch.setattr("lowbit.solvers.learned_rounding.projected_rank", lambda n, k: projected_rank(n, k, 0.2, RANK))


def projected_loss(w, fmt, parts) -> float:
    """The objective at some parts."""
    return Projection(w, RANK).loss(fmt.dequantize(parts, tuple(w.shape), torch.float32) - w)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_never_a_larger_projected_loss_than_rounding(name, spec):
    """Whatever the format, the loss after rounding is at most that of rounding to nearest."""
    fmt, w = parse_spec(spec), gaussian(64, 128)

    assert projected_loss(w, fmt, solver(name)(w, fmt)) <= projected_loss(w, fmt, fmt.quantize(w)) * (1 + 1e-6)


@pytest.mark.parametrize("spec", ["fp8_e4m3", "nvfp4"])
def test_the_closed_form_lowers_the_projected_loss(spec, monkeypatch):
    """Looking at three quarters of the vectors, the closed form takes a tenth off the loss after rounding."""
    monkeypatch.setattr("lowbit.solvers.learned_rounding.projected_rank", lambda *_: 96)
    fmt, w = parse_spec(spec), gaussian(128, 128)
    objective = Projection(w, 96)
    learned, plain = (
        objective.loss(fmt.dequantize(parts, (128, 128), torch.float32) - w)
        for parts in (solver("learned_rounding")(w, fmt), fmt.quantize(w))
    )

    assert learned < 0.9 * plain


def test_the_closed_form_brings_the_continuous_loss_to_zero():
    """With delta = -U U^T E V V^T nothing of the error is left within the leading singular vectors."""
    w, error = gaussian(96, 64), gaussian(96, 64, seed=5)
    objective = Projection(w, RANK)
    change = -objective.back(objective.seen(error))

    assert objective.loss(error + change) < 1e-5 * objective.loss(error)


def test_the_vectors_are_the_leading_ones():
    """U and V span the leading singular vectors of a weight whose spectrum falls."""
    u, _, v = torch.linalg.svd(gaussian(80, 60), full_matrices=False)
    w = (u * torch.arange(1, 61).float().pow(-1.5)) @ v
    objective = Projection(w, 8)

    assert torch.linalg.matrix_norm(objective.u.t() @ u[:, :8], ord="nuc") > 8 - 1e-2
    assert torch.linalg.matrix_norm(objective.v.t() @ v[:8].t(), ord="nuc") > 8 - 1e-2


@pytest.mark.parametrize(
    ("n", "k", "options", "expected"),
    [(512, 512, {}, 256), (128, 4096, {}, 128), (3072, 3072, {}, 614), (16384, 8192, {}, 1280),
     (1000, 2000, {"top_p": 0.5}, 500), (1000, 2000, {"min_k": 1, "top_p": 0.01}, 10)],
)  # fmt: skip
def test_the_rank_follows_its_three_bounds(n, k, options, expected):
    """The rank is top_p of the smaller side, at least min_k, at most max_k, and never more than there are."""
    assert projected_rank(n, k, **options) == expected


@pytest.mark.parametrize("spec", ["int8", "int8(rotation=16)", "fp8_e4m3", "awq_w4a16", "svdquant_w4a4"])
def test_the_gradient_is_that_of_autograd(spec):
    """The gradient by the codes is that of autograd through decoding: multiplied by the scale, not divided."""
    fmt, w = parse_spec(spec), gaussian(64, 128)
    problem = _Problem(w, fmt, "weight", None)
    steps = problem.steps()
    codes = torch.zeros_like(w, requires_grad=True)
    moved = problem.decoded + fmt.restore(codes * steps + 0) - w
    torch.linalg.vector_norm(problem.objective.u.t() @ moved @ problem.objective.v).backward()
    seen = problem.objective.seen(problem.decoded - w)
    exact = fmt.prepare(problem.objective.back(seen / torch.linalg.vector_norm(seen))) * steps

    torch.testing.assert_close(exact, codes.grad, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("spec", ["int8", "int8(rotation=16)", "awq_w4a16", "svdquant_w4a4"])
def test_a_step_is_what_one_code_is_worth(spec):
    """Raising every code by one changes the decoded weight by the steps."""
    fmt, w = parse_spec(spec), 0.5 * gaussian(64, 128)
    problem = _Problem(w, fmt, "weight", None)
    codes = fmt.unpack(problem.plain["qdata"], 128)
    signed = codes.to(torch.int16)
    raised = (signed + (signed < (15 if spec.startswith("awq") else 7 if spec.startswith("svd") else 127))).to(
        codes.dtype
    )
    change = fmt.decode(raised, problem.params) - fmt.decode(codes, problem.params)
    expected = problem.steps() * (raised != codes)

    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weight_gives_the_same_bits(name):
    """Nothing is random without a seed."""
    fmt, w = parse_spec("nvfp4"), gaussian(48, 64)
    first, second = (solver(name)(w, fmt)["qdata"] for _ in range(2))

    assert torch.equal(first, second)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_lowers_a_quadratic(name):
    """Each brings the norm of a vector down to a small part of what it was."""
    x, goal = torch.zeros(50), gaussian(1, 50)[0] * 0.2
    optimizer = OPTIMIZERS[name](x)
    for _ in range(300):
        loss = float((x - goal).norm())
        optimizer.step((x - goal) / max(loss, 1e-12), loss)

    assert float((x - goal).norm()) < 0.15 * float(goal.norm())


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(lambda x: AdamW(x, rate=0.1), lambda x: torch.optim.AdamW([x], lr=0.1)),
     (lambda x: RAdam(x, rate=0.1), lambda x: torch.optim.RAdam([x], lr=0.1))],
)  # fmt: skip
def test_steps_are_those_of_torch(mine, theirs):
    """AdamW and RAdam walk as PyTorch's do."""
    own, other = gaussian(4, 8), gaussian(4, 8).requires_grad_()
    optimizer, reference = mine(own), theirs(other)
    for i in range(12):
        gradient = gaussian(4, 8, seed=i + 1)
        other.grad = gradient.clone()
        optimizer.step(gradient, 1.0)
        reference.step()

    torch.testing.assert_close(own, other.detach(), rtol=1e-5, atol=1e-6)


def test_prodigy_finds_its_step_size():
    """From a guess of 1e-6, the distance estimate grows to the order of the distance, and never beyond it here."""
    x, goal = torch.zeros(40), torch.full((40,), 3.0)
    optimizer = Prodigy(x)
    for _ in range(200):
        optimizer.step((x - goal).sign(), 1.0)

    assert 0.1 < optimizer.distance <= 3.0


def test_polyak_reaches_the_minimum_of_a_norm_at_once():
    """Where the least loss is 0, Polyak's step along the gradient of a norm ends in the minimum."""
    x, goal = torch.zeros(20), gaussian(1, 20)[0]
    Polyak(x).step(-goal / goal.norm(), float(goal.norm()))

    torch.testing.assert_close(x, goal)


def test_it_does_not_help_the_output_and_solve_says_so():
    """On held-out samples it is no better than rounding, so `solve` keeps rounding; gptq is far better."""
    fmt, w = parse_spec("fp8_e4m3"), gaussian(128, 128)
    mix = gaussian(128, 128, seed=3) * torch.arange(1, 129).float().pow(-0.5)
    x = gaussian(4096, 128, seed=4) @ mix.t()
    halves = [rows.t() @ rows / 2048 for rows in x.split(2048)]
    statistics = Statistics(hessian=halves[0], tokens=2048, held_out=halves[1], held_out_tokens=2048)
    learned = solve(w, fmt, "learned_rounding", statistics)
    direct = output_error(w, fmt, solver("learned_rounding")(w, fmt), halves[1])
    refined = solve(w, fmt, "scale_search+gptq", statistics)

    assert direct[0] / direct[1] > learned.rtn_error
    assert learned.solver == "rtn"
    assert "learned_rounding was worse" in learned.note
    assert refined.error < 0.7 * learned.error


def test_options_are_those_of_the_function(monkeypatch):
    """A pipeline with options behind the name gives the bytes of the function with these arguments, and says them."""
    fmt, w = parse_spec("fp8_e4m3"), gaussian(64, 96)
    monkeypatch.setattr("lowbit.solvers.learned_rounding.projected_rank", projected_rank)
    found = {}
    for text, bounds in {
        "": {},
        "(max_k=8)": {"max_k": 8},
        "( min_k = 1, top_p=0.5 )": {"min_k": 1, "top_p": 0.5},
    }.items():
        solution = solve(w, fmt, f"learned_rounding{text}")
        found[text] = solution.parts["qdata"]
        assert torch.equal(found[text], solver("learned_rounding")(w, fmt, **bounds)["qdata"])
        assert solution.solver == f"learned_rounding{text.replace(' ', '')}"
    assert not torch.equal(found[""], found["(max_k=8)"])


def test_the_search_has_options(monkeypatch):
    """`iterations` bounds the steps, `lr` is the optimizer's rate, and the + of an exponent joins nothing."""
    fmt, w, steps = parse_spec("int8"), gaussian(32, 64), []

    class Counting(AdamW):
        def step(self, gradient, loss):
            steps.append(self.rate)
            super().step(gradient, loss)

    monkeypatch.setitem(OPTIMIZERS, "adamw", Counting)
    found = solve(w, fmt, "learned_rounding_adamw(iterations=3,lr=1e+2)")

    assert steps == [100.0] * 3
    assert found.solver == "learned_rounding_adamw(iterations=3,lr=1e+2)"


@pytest.mark.parametrize(
    ("name", "said"),
    [("learned_rounding(top_p=0)", "top_p is '0', expected a number above 0 and at most 1"),
     ("learned_rounding(top_p=nan)", "top_p is 'nan'"), ("learned_rounding(top_p=1.5)", "top_p is '1.5'"),
     ("learned_rounding(min_k=2.5)", "min_k is '2.5', expected a whole number of at least 1"),
     ("learned_rounding(max_k=0)", "max_k is '0'"), (f"learned_rounding(max_k=-1{'0' * 400})", "max_k is '-1000"),
     ("learned_rounding_radam(lr=inf)", "lr is 'inf', expected a number above 0"),
     ("learned_rounding(iterations=3)", "learned_rounding has no option 'iterations'; it has top_p, min_k, max_k"),
     ("learned_rounding_prodigy(lr=1)", "has no option 'lr'; it has top_p, min_k, max_k, iterations"),
     ("rtn(top_p=1)", "rtn has no option 'top_p'; it has none"), ("learned_rounding(top_p=1", "not closed"),
     ("learned_rounding()", "write each option once, as option=value"),
     ("learned_rounding(top_p=1,top_p=1)", "write each option once"),
     ("learned(top_p=1)", r"unknown solver 'learned\(top_p=1\)'")],
)  # fmt: skip
def test_wrong_options_are_known_before_a_weight_is(name, said):
    """A plan reads the pipeline, so a wrong option is one error that names it, before anything is converted."""
    with pytest.raises(SolverError, match=said):
        parse_pipeline(name)


def test_a_whole_number_has_no_upper_end():
    """One that no float holds is a number like others."""
    assert parse_pipeline(f"learned_rounding(max_k=1{'0' * 400})").start.startswith("learned_rounding(max_k=1000")


def test_options_go_with_refinements_and_a_bias():
    """They belong to the start, and the rest of the pipeline is read as ever."""
    found = parse_pipeline("learned_rounding(top_p=0.5,max_k=9)+gptq+bias")

    assert (found.start, found.steps, found.bias) == ("learned_rounding(top_p=0.5,max_k=9)", ("gptq",), True)
    assert parse_pipeline(found.name) == found
