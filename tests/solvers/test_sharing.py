"""Layers with the same input that share smooth_factor and proj_down: what they become, and when they do not share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import SolverError, WeightError
from lowbit.formats import parse_spec
from lowbit.solvers import Member, Statistics, sharing, solve, solve_shared
from lowbit.solvers.svdquant import svdquant_shared
from tests.solvers.test_svdquant import gained, power_law, seen
from tests.support import gaussian

K = 256
FMT = parse_spec("svdquant_w4a4(rank=16)")
PIPELINE = "svdquant+gptq+descent"


@pytest.fixture(scope="module")
def known() -> Statistics:
    """Statistics of an input with outlier channels."""
    return seen(power_law(2048, 1))


def members(name: str = PIPELINE, **more) -> list[Member]:
    """Three weights of different heights."""
    return [Member(gaussian(n, K, seed=n), name, where=f"layer {n}", **more) for n in (192, 64, 128)]


def shares(solutions) -> bool:
    """Whether all have the same smooth_factor and proj_down, by bits."""
    first = solutions[0].parts
    return all(
        torch.equal(one.parts[name], first[name]) for one in solutions for name in ("smooth_factor", "proj_down")
    )


def test_refinements_go_on_from_the_shared_start(known):
    """Factors are those of svdquant_shared, bit for bit; what each layer becomes from there beats its start."""
    group = members()
    done = solve_shared(group, FMT, known)
    starts = svdquant_shared([one.w for one in group], FMT, known)

    assert done.shared
    assert shares(done.solutions)
    for one, start, found in zip(group, starts, done.solutions, strict=True):
        assert found.solver == PIPELINE
        assert found.error < found.rtn_error
        assert torch.equal(found.parts["proj_up"], start["proj_up"])
        assert gained(FMT, found.parts, one.w, power_law(256, 2)) > gained(FMT, start, one.w, power_law(256, 2))


def test_what_sharing_costs(known):
    """On fresh inputs each layer loses less than 2.5 dB against its own factors, and gains over plain rounding."""
    x = power_law(512, 2)
    group = members()
    for one, found in zip(group, solve_shared(group, FMT, known).solutions, strict=True):
        alone = gained(FMT, solve(one.w, FMT, PIPELINE, known).parts, one.w, x)
        shared = gained(FMT, found.parts, one.w, x)
        assert shared > alone - 2.5
        assert shared > gained(FMT, solve(one.w, FMT, "rtn").parts, one.w, x) + 2


@pytest.mark.parametrize(("name", "given"), [("scale_search", False), ("rtn", False), ("rtn", True)])
def test_other_starts_share_too(known, name, given):
    """The format's own fit is made for all rows together, with statistics and without."""
    group = members(name)
    done = solve_shared(group, FMT, known if given else None)

    assert done.shared
    assert shares(done.solutions)
    for one, found in zip(group, done.solutions, strict=True):
        assert found.solver == name
        FMT.check(found.parts, tuple(one.w.shape))
        assert (
            float((FMT.dequantize(found.parts, tuple(one.w.shape), torch.float32) - one.w).norm() / one.w.norm()) < 0.13
        )


def test_an_input_of_nothing_but_zeros_shares_the_data_free_fit(known):
    """Second moments of zeros give shared factors as well, those of no statistics."""
    zeros = Statistics(hessian=torch.zeros(K, K), tokens=9)
    weights = [one.w for one in members()]
    found, wanted = svdquant_shared(weights, FMT, zeros), solve_shared(members("scale_search"), FMT).solutions

    for parts, solution in zip(found, wanted, strict=True):
        assert all(torch.equal(parts[name], solution.parts[name]) for name in parts)


@pytest.mark.parametrize("of", [None, 0])
def test_a_group_falls_back_together(known, monkeypatch, of):
    """Where one layer is worse than rounding to nearest with the shared factors, none shares, and all notes say why.

    The gradient at the output of one of them, as its statistics have it, is not taken for that of the others.
    """
    group = members("svdquant")

    def spoiled(weights, *arguments, **options):
        parts = svdquant_shared(weights, *arguments, **options)
        parts[1]["scale"] = parts[1]["scale"] * 8
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(sharing, "svdquant_shared", spoiled)
        seen_of_one = known if of is None else replace(known, output_hessian=torch.eye(len(group[of].w)))
        done = solve_shared(group, FMT, seen_of_one)
    assert not done.shared
    for one, found in zip(group, done.solutions, strict=True):
        alone = solve(one.w, FMT, "svdquant", known)
        assert found.note == (
            "shares nothing: layer 64 was worse than rounding to nearest with the factors that it shared"
        )
        assert found.error == alone.error
        assert all(torch.equal(found.parts[name], alone.parts[name]) for name in alone.parts)


def test_a_layer_may_keep_the_start_while_others_are_refined(known):
    """Where refining loses on the samples held out, the shared start is kept, and the factors stay shared."""
    flip = torch.where(torch.arange(K) % 2 == 0, 1.0, -1.0)
    broken = replace(known, held_out=known.held_out * torch.outer(flip, flip))
    done = solve_shared(members(), FMT, broken)

    assert done.shared == shares(done.solutions)
    for found in done.solutions:
        assert found.error <= found.rtn_error
        assert found.note


def test_the_bias_is_each_layers_own(known):
    """A layer with a bias gets its correction, one without gets none."""
    group = [replace(one, name=f"{PIPELINE}+bias", has_bias=i == 0) for i, one in enumerate(members())]
    found = solve_shared(group, FMT, replace(known, mean=torch.linspace(-1, 1, K))).solutions

    assert found[0].bias is not None
    assert found[0].bias.shape == (192,)
    assert [one.bias for one in found[1:]] == [None, None]
    assert found[0].solver == f"{PIPELINE}+bias"
    assert found[1].solver == PIPELINE


def test_what_cannot_share_is_refused(known):
    """Other formats, other widths, different pipelines and bad weights are errors that name the layers."""
    group = members()
    with pytest.raises(SolverError, match=r"qkv: nvfp4 has no low-rank branch"):
        solve_shared(group, parse_spec("nvfp4"), known, where="qkv")
    with pytest.raises(SolverError, match=r"qkv: weights that share proj_down need one K"):
        solve_shared([Member(gaussian(64, K)), Member(gaussian(64, 2 * K))], FMT, where="qkv")
    with pytest.raises(SolverError, match=r"qkv: layers that share their low rank need one pipeline"):
        solve_shared([group[0], replace(group[1], name="svdquant")], FMT, known, where="qkv")
    with pytest.raises(SolverError, match=r"qkv: learned_rounding cannot start several layers"):
        solve_shared(members("learned_rounding"), FMT, where="qkv")
    with pytest.raises(WeightError, match=r"layer 64: holds NaN or infinity"):
        solve_shared([group[0], replace(group[1], w=torch.full((64, K), torch.nan))], FMT, known, where="qkv")
    with pytest.raises(SolverError, match=r"layer 192: svdquant\+gptq\+descent needs second moments"):
        solve_shared(group, FMT, where="qkv")
