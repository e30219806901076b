"""Solving never loses against plain rounding on samples held out, says what it did, and gives the same bits again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.solvers import (
    AUTO,
    Solution,
    Statistics,
    base,
    curvature,
    parse_pipeline,
    pick_solver,
    refinement,
    solve,
    solver,
)
from tests.support import gaussian
from tests.support.layers import Layer

SPECS = [
    "int8",
    "int8(granularity=tensor)",
    "int8(granularity=block,block_size=16x24)",
    "int8(rotation=64)",
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "fp8_e5m2(granularity=block,block_size=16x16)",
    "mxfp8",
    "nvfp4",
    "awq_w4a16(group_size=32)",
    "svdquant_w4a4(rank=4)",
    "awq_w4a16(pre_quant_scale=true)",
]
TOKENS = [6, 16, 64, 256, 2048]  # 0.1 to 32 for each of 64 channels


def missed(w: Tensor, fmt: Format, parts: Parts) -> Tensor:
    """The error of the weight, float64 [N, K]."""
    return fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32).double() - w.double()


def relative_error(w: Tensor, fmt: Format, parts: Parts, h: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T)."""
    e, whole = missed(w, fmt, parts), w.double()
    return float(((e @ h.double()) * e).sum() / ((whole @ h.double()) * whole).sum())


def raw(parts: Parts) -> dict[str, bytes]:
    """The bytes of all parts."""
    return {name: part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, part in parts.items()}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("spec", SPECS)
def test_never_worse_than_rounding_on_samples_held_out(spec, tokens):
    """For four spectra each, 240 layers in all: the held-out error is what is said, and not above rounding's."""
    fmt = parse_spec(spec)
    for seed, alpha in enumerate((0.0, 0.5, 1.0, 2.0)):
        layer = Layer.make(32, 64, alpha, seed, mean=0.3 * seed)
        known, w = layer.statistics(tokens, seed), layer.weight
        found = solve(w, fmt, AUTO, known)
        rounded = solver("rtn")(w, fmt.plain)

        fmt.check(found.parts, (32, 64))
        assert found.error <= found.rtn_error
        assert found.error == pytest.approx(relative_error(w, fmt, found.parts, known.held_out), rel=1e-4)
        assert found.rtn_error == pytest.approx(relative_error(w, fmt.plain, rounded, known.held_out), rel=1e-3)
        assert found.bias is None


@pytest.mark.parametrize("spec", ["int8", "nvfp4"])
def test_many_samples_help(spec):
    """With 32 samples a channel of correlated inputs the whole chain runs and gains at least 1.5 dB; without a note."""
    layer = Layer.make(64, 64, 1.0)
    found = solve(layer.weight, parse_spec(spec), AUTO, layer.statistics(2048))

    assert found.solver == "scale_search+gptq+descent"
    assert found.note == ""
    assert found.error < 0.7 * found.rtn_error


@pytest.mark.parametrize(("spec", "shape"), [("int8", (32, 64)), ("svdquant_w4a4(rank=4)", (64, 128))])
def test_rounding_of_the_input_counts(spec, shape):
    """Formats that round their input are judged by that too, as far as samples of it are known."""
    layer = Layer.make(*shape, 1.0)
    with_samples, without = (
        solve(layer.weight, parse_spec(spec), "scale_search", layer.statistics(256, kept=kept)) for kept in (256, 0)
    )

    assert with_samples.error > 1.2 * without.error
    assert with_samples.rtn_error > with_samples.error


def misleading(k: int = 64) -> Statistics:
    """Statistics whose halves contradict each other: what helps on one half hurts on the other."""
    x = Layer.make(1, k, 2.0).samples(4096)
    flipped = x * torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
    h, o = ((s.t() @ s / 4096).float() for s in (x, flipped))
    return Statistics(hessian=h, tokens=4096, held_out=o, held_out_tokens=4096)


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "nvfp4"])
def test_a_refinement_that_loses_is_left_out_and_said(spec):
    """Where trials lose on the other half, the start alone stays or plain rounding, and `solver` and `note` say so."""
    w, fmt = gaussian(32, 64), parse_spec(spec)
    found = solve(w, fmt, "scale_search+gptq", misleading())

    assert found.solver in ("scale_search", "rtn")
    assert "a trial with H shrunk by 0.2 lost; a trial with H shrunk by 0.5 lost" in found.note
    assert found.error <= found.rtn_error


def test_what_loses_altogether_is_plain_rounding(monkeypatch):
    """When the start loses too, the parts are those of rounding to nearest, named rtn, with the reasons."""
    fmt, layer = parse_spec("int8"), Layer.make(16, 64, 1.0)

    def worse(w, fmt, statistics=None, *, where="weight", seed=None):
        return solver("rtn")(w * 1.2, fmt)

    monkeypatch.setitem(base._REGISTRY, "worse", worse)
    found = solve(layer.weight, fmt, "worse", layer.statistics(512))

    assert found.solver == "rtn"
    assert found.note == "worse was worse than rounding to nearest on the samples held out"
    assert found.error == found.rtn_error
    assert raw(found.parts) == raw(solver("rtn")(layer.weight, fmt))


def test_a_refinement_is_held_against_the_start():
    """One that beats rounding but not the scales searched before it is left out: the start is better."""
    better = 0
    for seed in range(6):
        layer, fmt = Layer.make(64, 64, 0.0, seed), parse_spec("nvfp4")
        known = layer.statistics(8, seed)
        found, start = (solve(layer.weight, fmt, name, known) for name in (AUTO, "scale_search"))
        better += relative_error(layer.weight, fmt, found.parts, layer.hessian) <= 1.05 * relative_error(
            layer.weight, fmt, start.parts, layer.hessian
        )
    assert better == 6


def test_without_a_second_half_it_is_said():
    """Statistics of one half only are used, and the note says that nothing was held out."""
    layer = Layer.make(16, 64, 1.0)
    known = replace(layer.statistics(512), held_out=None, held_out_tokens=0)

    found = solve(layer.weight, parse_spec("int8"), AUTO, known)
    assert found.note == "judged on the samples it was made from: there are no others"
    assert found.error < found.rtn_error


@pytest.mark.parametrize(
    ("spec", "known", "has_bias", "expected"),
    [("int8", "", True, "rtn"), ("int8", "diagonal", True, "scale_search"),
     ("int8", "full", True, "scale_search+gptq+descent+bias"), ("int8", "full", False, "scale_search+gptq+descent"),
     ("nvfp4", "", True, "scale_search"), ("svdquant_w4a4", "full", True, "svdquant+gptq+descent+bias"),
     ("awq_w4a16(pre_quant_scale=true)", "diagonal", False, "awq"),
     ("awq_w4a16(pre_quant_scale=true)", "full", False, "awq+gptq+descent")],
)  # fmt: skip
def test_auto_takes_what_is_known(spec, known, has_bias, expected):
    """The more is known of the input, the more steps; a bias is corrected only where there is one."""
    assert pick_solver(AUTO, parse_spec(spec), known, has_bias=has_bias)[0] == expected


@pytest.mark.parametrize(
    ("spec", "name", "said"),
    [("int8", "svdquant", "int8 has no low-rank branch, so svdquant does not apply"),
     ("gguf", "svdquant+gptq", "no low-rank branch"), ("mxfp8(input_scale=true)", AUTO, "has no static scale"),
     ("svdquant_w4a4(input_scale=true)", "rtn", "has no static scale")],
)  # fmt: skip
def test_what_a_format_cannot_have_is_known_before_a_weight_is(spec, name, said):
    """A plan, which picks solvers, refuses what would end in an error at the first layer."""
    with pytest.raises(SolverError, match=said):
        pick_solver(name, parse_spec(spec), "full")


def test_svdquant_without_moments_says_what_it_is():
    """Asked for by name where nothing is known, it is a scale search, and the plan says so."""
    fmt = parse_spec("svdquant_w4a4")

    assert pick_solver("svdquant", fmt)[1] == (
        "as asked; it needs second moments of the input, and without them it is scale_search"
    )
    assert pick_solver("svdquant", fmt, "diagonal")[1] == "as asked"


def test_a_diagonal_weighs_the_search():
    """Of a diagonal H only the start is run, weighted by it: channels with large inputs get the better part."""
    w, fmt = gaussian(32, 64), parse_spec("nvfp4")
    diagonal = torch.where(torch.arange(64) % 16 == 0, 100.0, 0.01)
    found = solve(w, fmt, AUTO, Statistics(diagonal, 999, diagonal, 999))

    assert found.solver == "scale_search"
    assert found.error < 0.7 * found.rtn_error


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("gradient", "unknown solver 'gradient'; known solvers: auto, .*refinements: .*gptq.*, bias"),
     ("", "unknown solver ''"), ("rtn+", "unknown solver ''"), ("rtn+gptq+rtn", "rtn is out of place"),
     ("rtn+bias+gptq", "bias is out of place"), ("gptq+scale_search", "scale_search is out of place"),
     ("rtn+auto", "unknown solver 'auto'"), ("bias+bias", "bias is out of place")],
)  # fmt: skip
def test_pipelines_that_are_none_are_refused(name, complaint):
    """Unknown parts and parts out of place are errors that say how to write it."""
    with pytest.raises(SolverError, match=complaint):
        parse_pipeline(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gptq", "scale_search+gptq"), (" rtn + gptq ", "rtn+gptq"), ("bias", "scale_search+bias"), ("rtn", "rtn"),
     ("rtn+gptq+coordinate_descent+scale_refit+bias", "rtn+gptq+coordinate_descent+scale_refit+bias")],
)  # fmt: skip
def test_pipelines_are_read(name, expected):
    """A missing start is a scale search, spaces do not count, and the name is read back as itself."""
    assert parse_pipeline(name).name == expected
    assert parse_pipeline(expected) == parse_pipeline(name)


@pytest.mark.parametrize("known", [None, Statistics(), Statistics(torch.ones(64), 10)])
def test_refinements_need_the_whole_matrix(known):
    """gptq without [K, K] is an error that names the layer and says what to do."""
    with pytest.raises(SolverError, match=r"blocks\.3: scale_search\+gptq needs second moments \[K, K\].*calibrate"):
        solve(gaussian(8, 64), parse_spec("int8"), "gptq", known, where="blocks.3")


@pytest.mark.parametrize("name", ["rtn+gptq", "rtn+bias", AUTO])
def test_a_seed_goes_with_no_refinement(name):
    """Stochastic rounding and refinements contradict each other: an error that names the layer."""
    layer = Layer.make(16, 64, 1.0)
    with pytest.raises(SolverError, match=r"blocks\.3: .* does not round stochastically"):
        solve(layer.weight, parse_spec("int8"), name, layer.statistics(99), seed=1, where="blocks.3", has_bias=True)


def mean_error(layer: Layer, fmt: Format, found: Solution) -> float:
    """The length of the mean of the output's error."""
    shift = missed(layer.weight, fmt, found.parts) @ layer.mean
    return float((shift if found.bias is None else shift + found.bias.double()).norm())


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "nvfp4", "awq_w4a16", "svdquant_w4a4(rank=4)"])
@pytest.mark.parametrize("name", ["rtn+bias", "scale_search+gptq+descent+bias"])
def test_a_bias_takes_the_mean_error_away(spec, name):
    """Added to the bias, the correction brings the mean error to a twentieth or less; the error says so."""
    fmt, layer = parse_spec(spec), Layer.make(64, 64, 1.0, mean=1.0)
    known = layer.exact()
    with_bias = solve(layer.weight, fmt, name, known, has_bias=True)
    without = solve(layer.weight, fmt, name, known)

    assert (with_bias.solver, without.solver) == (name, name.removesuffix("+bias"))
    assert without.bias is None
    assert with_bias.bias.shape == (64,)
    assert mean_error(layer, fmt, with_bias) < 0.05 * mean_error(layer, fmt, without)
    assert with_bias.error < without.error
    centred = layer.hessian - torch.outer(layer.mean, layer.mean).float()
    e = missed(layer.weight, fmt, with_bias.parts)
    whole = layer.weight.double()
    signal = ((whole @ layer.hessian.double()) * whole).sum()
    assert with_bias.error == pytest.approx(float(((e @ centred.double()) * e).sum() / signal), rel=1e-3)


def test_the_mean_of_noise_is_not_corrected():
    """Of inputs without a mean, few samples seem to have one; correcting that costs less than half of what it would."""
    cost = naive = 0.0
    for seed in range(10):
        layer, fmt = Layer.make(64, 64, 0.5, seed), parse_spec("int8")
        known = layer.statistics(8, seed)
        found = solve(layer.weight, fmt, "rtn+bias", known, has_bias=True)
        cost += float(found.bias.square().sum())
        naive += float((missed(layer.weight, fmt, found.parts).float() @ known.mean).square().sum())
    assert cost < 0.5 * naive  # a third in theory, for each channel on its own


def test_a_bias_without_a_mean_stays_and_that_is_said():
    """Where the mean is not known, the correction is left out, of the name too, with a note."""
    layer, fmt = Layer.make(16, 64, 1.0), parse_spec("int8")
    for known in (replace(layer.statistics(512), mean=None), Statistics(mean=None)):
        name = "rtn+gptq+bias" if known.hessian is not None else "rtn+bias"
        found = solve(layer.weight, fmt, name, known, has_bias=True)
        assert found.bias is None
        assert found.solver == name.removesuffix("+bias")
        assert found.note == "the bias stays: the mean of the input is not known"


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_layer_gives_the_same_bytes(spec):
    """Two runs agree in every byte of every part and in the bias; neither weight nor statistics change."""
    layer, fmt = Layer.make(32, 64, 1.0, mean=0.5), parse_spec(spec)
    known = layer.statistics(256)
    before = layer.weight.clone(), known.hessian.clone(), known.held_out.clone()
    one, two = (solve(layer.weight, fmt, AUTO, known, has_bias=True) for _ in range(2))

    assert raw(one.parts) == raw(two.parts)
    assert torch.equal(one.bias, two.bias)
    assert (one.error, one.note, one.solver) == (two.error, two.note, two.solver)
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.weight, known.hessian, known.held_out), strict=True))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "tensor" not in spec and spec != "fp8_e4m3"])
def test_rows_are_solved_in_pieces(spec, monkeypatch):
    """Solved a few rows at a time, a layer has the same error; sums in another order may move single codes."""
    layer, fmt = Layer.make(72, 64, 1.0), parse_spec(spec)
    known = layer.statistics(512)
    whole = solve(layer.weight, fmt, AUTO, known)
    monkeypatch.setattr(refinement, "DRAFT_ELEMENTS", 64 * 20)
    pieces = solve(layer.weight, fmt, AUTO, known)

    same = [a == b for a, b in zip(raw(whole.parts)["qdata"], raw(pieces.parts)["qdata"], strict=True)]
    assert sum(same) > 0.99 * len(same)
    assert pieces.solver == whole.solver
    assert pieces.error == pytest.approx(whole.error, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spec", ["int8", "nvfp4", "awq_w4a16", "svdquant_w4a4(rank=4)"])
def test_any_float_weight_is_solved(spec, dtype):
    """A weight of another dtype gives the parts of its values, close to those of the same in float32."""
    layer, fmt = Layer.make(32, 64, 1.0), parse_spec(spec)
    known, w = layer.statistics(512), layer.weight.to(dtype)
    found, wide = (solve(x, fmt, AUTO, known) for x in (w, w.float()))

    fmt.check(found.parts, (32, 64))
    assert found.error == pytest.approx(wide.error, rel=0.1)


@pytest.mark.parametrize(("n", "k"), [(1, 64), (64, 1), (1, 1), (0, 64), (3, 33)])
@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "fp8_e4m3(granularity=block)", "mxfp8", "nvfp4"])
def test_the_smallest_layers_are_solved(spec, n, k):
    """One row, one column, one weight or none: the parts are those of the format."""
    layer, fmt = Layer.make(n, k, 1.0), parse_spec(spec)
    found = solve(layer.weight, fmt, AUTO, layer.statistics(64), has_bias=True)

    fmt.check(found.parts, (n, k))
    assert n == 0 or found.error <= found.rtn_error


@pytest.mark.parametrize("spec", SPECS)
def test_a_weight_of_zeros_stays_zero(spec):
    """No refinement makes anything of zeros."""
    layer, fmt = Layer.make(32, 64, 1.0, mean=0.5), parse_spec(spec)
    found = solve(torch.zeros(32, 64), fmt, AUTO, layer.statistics(256), has_bias=True)

    assert float(fmt.dequantize(found.parts, (32, 64), torch.float32).abs().max()) < 1e-6
    assert (found.error, found.rtn_error) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("tokens", "narrow", "broad"), [(6, 0.3, 0.3), (128, 0.2, 0.2), (256, 0.2, 0.1), (2048, 0.2, 0.05)]
)
def test_broad_statistics_are_shrunk_less(tokens, narrow, broad):
    """By 0.4 K / T, at most 0.3, and at least 0.05 where the samples are of many kinds, else 0.2."""
    assert curvature.shrinkage(tokens, 64) == pytest.approx(narrow)
    assert curvature.shrinkage(tokens, 64, broad=True) == pytest.approx(broad)


def test_what_a_rotation_is_worth():
    """A rotation takes half of the error and more off a layer with a heavy tail and channels that stand out."""
    torch.manual_seed(3)
    w, x = torch.randn(64, 256), torch.randn(128, 256)
    w, x = (rows / torch.randn_like(rows).square().add_(0.3).sqrt_() for rows in (w, x))
    x[:, ::64] *= 20
    lost = {}
    for spec in ("int8", "int8(rotation=256)"):
        fmt = parse_spec(spec)
        out = fmt.linear(x, solve(w, fmt).parts, None)
        lost[spec] = float((out - x @ w.t()).norm() / (x @ w.t()).norm())
    assert lost["int8(rotation=256)"] < 0.5 * lost["int8"]
