"""What is reported of a layer is what it gains on inputs that nothing was made of, with few samples as with many."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch

from lowbit.formats import parse_spec
from lowbit.solvers import AUTO, Solution, solve, solver
from lowbit.solvers.curvature import output_loss
from lowbit.solvers.unseen import Trial, row_shares
from tests.support.layers import Layer

SIZE = 128


def decibels(ratio: float) -> float:
    """Of an error by a smaller one."""
    return 10 * math.log10(ratio)


def true_gain(layer: Layer, spec: str, found: Solution, outputs: torch.Tensor | None = None) -> float:
    """Over rounding to nearest, with the second moments that the samples were drawn from, in dB."""
    fmt, w, h = parse_spec(spec), layer.weight, layer.hessian
    rounded = output_loss(w, fmt.plain, solver("rtn")(w, fmt.plain), h, outputs)
    return decibels(rounded / output_loss(w, fmt, found.parts, h, outputs))


def excesses(spec: str, tokens: int, alphas: tuple[float, ...]) -> tuple[float, float]:
    """By how many dB `error` and `unseen_error` are too good on average."""
    shown, told = 0.0, 0.0
    for alpha in alphas:
        for seed in range(2):
            layer = Layer.make(SIZE, SIZE, alpha, seed)
            found = solve(layer.weight, parse_spec(spec), AUTO, layer.statistics(tokens, seed))
            true = true_gain(layer, spec, found)
            shown += decibels(found.rtn_error / found.error) - true
            told += decibels(found.rtn_error / found.unseen_error) - true
    return shown / (2 * len(alphas)), told / (2 * len(alphas))


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "nvfp4", "svdquant_w4a4(rank=8)"])
@pytest.mark.parametrize(("tokens", "flattered", "within"), [(32, 1.2, 0.7), (128, 0.5, 0.5), (4096, 0.0, 0.1)])
def test_the_reported_gain_is_that_on_fresh_inputs(spec, tokens, flattered, within):
    """From a quarter of a token a channel to 32, on average; where they are few, the samples themselves show more."""
    shown, told = excesses(spec, tokens, (0.5, 1.0, 2.0))

    assert shown > flattered
    assert abs(told) < within


def test_gradients_are_no_less_honest():
    """The same where rows make up for each other by gradients that were estimated, too."""
    shown = told = 0.0
    for seed in range(4):
        layer, output = Layer.make(SIZE, SIZE, 1.0, seed), Layer.make(1, SIZE, 1.0, seed + 50)
        seen = output.statistics(SIZE, seed + 9)
        known = replace(layer.statistics(SIZE, seed), output_hessian=seen.hessian, output_held_out=seen.held_out)
        found = solve(layer.weight, parse_spec("int8"), AUTO, known)
        true = true_gain(layer, "int8", found, output.hessian)
        shown += decibels(found.rtn_error / found.error) / 4 - true / 4
        told += decibels(found.rtn_error / found.unseen_error) / 4 - true / 4

    assert shown > 1.2
    assert abs(told) < 0.6


@pytest.mark.parametrize("name", ["rtn", "scale_search"])
def test_what_only_saw_one_half_is_reported_as_it_is(name):
    """The half held out is fresh for it: nothing is taken off."""
    layer = Layer.make(32, 64)
    found = solve(layer.weight, parse_spec("nvfp4"), name, layer.statistics(64))

    assert found.unseen_error == found.error


def test_svdquant_alone_is_reported_lower():
    """Its low rank is of both halves: the reported gain lies below the one on the samples, about at the true one."""
    layer, spec = Layer.make(SIZE, SIZE, 0.0), "svdquant_w4a4(rank=8)"
    found = solve(layer.weight, parse_spec(spec), "svdquant", layer.statistics(13))
    shown, told = (decibels(found.rtn_error / error) for error in (found.error, found.unseen_error))
    true = true_gain(layer, spec, found)

    assert found.solver == "svdquant"
    assert shown > true + 0.7
    assert told == pytest.approx(true, abs=0.5)


def test_without_samples_held_out_nobody_knows():
    """There is no figure then, only the note that says what `error` is of."""
    layer = Layer.make(32, 64)
    known = replace(layer.statistics(64), held_out=None, held_out_tokens=0)
    found = solve(layer.weight, parse_spec("int8"), AUTO, known)

    assert found.unseen_error is None
    assert found.note == "judged on the samples it was made from: there are no others"
    assert solve(layer.weight, parse_spec("int8")).unseen_error is None


def test_plain_rounding_is_made_of_no_samples():
    """So nothing is said of them where none are held out."""
    known = replace(Layer.make(32, 64).statistics(64), held_out=None, held_out_tokens=0)

    assert solve(Layer.make(32, 64).weight, parse_spec("int8"), "rtn", known).note == ""


def test_an_error_is_never_below_zero(monkeypatch):
    """What rounding leaves of a sum that cancels has no logarithm, and the command takes one of every error."""
    layer = Layer.make(32, 64)
    monkeypatch.setattr(importlib.import_module("lowbit.solvers.solve"), "output_loss", lambda *_: -1e-9)
    found = solve(layer.weight, parse_spec("int8"), "scale_search", layer.statistics(64))

    assert (found.error, found.rtn_error, found.unseen_error) == (0.0, 0.0, 0.0)


def test_a_layer_that_only_its_samples_favour_is_not_kept(monkeypatch):
    """Better than rounding on the samples, but not to be expected to be on others: the start stays, and why is said."""
    layer, fmt = Layer.make(64, 64), parse_spec("int8")
    monkeypatch.setattr(Trial, "expected", lambda *_: math.inf)
    found = solve(layer.weight, fmt, "scale_search+gptq", layer.statistics(256))

    assert found.solver == "scale_search"
    assert found.note == "scale_search+gptq was better on its own samples, but hardly is on others"
    assert found.error <= found.rtn_error


@pytest.mark.parametrize(
    ("seen", "other", "lost", "expected"),
    [
        (0.25, 0.25, 0.2, 0.2),  # nothing was fitted that is not there on the other half
        (0.25, 1.0, 0.2, 10**-0.15),  # a gap of 6 dB: half of it, but no more gain than the trial's and 1.5 dB
        (0.25, 0.36, 0.3, 0.36),  # 0.3 (0.36 / 0.25)^(1/2)
        (0.3, 0.2, 0.2, 0.2),  # better on the other half, by chance: never less than on the samples
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_law_of_halves(seen, other, lost, expected):
    """Half of what a trial loses more on the half that it did not see is taken off, in dB."""
    assert Trial(seen, other).expected(lost, 1.0) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("tokens", "held_out"), [(224, 32), (32, 224), (250, 6)])
def test_halves_need_not_be_alike(tokens, held_out):
    """Of a long text and a short one: the figure is as honest, and the samples show more than there is."""
    shown = told = 0.0
    for seed in range(4):
        layer = Layer.make(SIZE, SIZE, 1.0, seed)
        first, second = layer.samples(256, seed).split([tokens, held_out])
        halves = {"hessian": (first.t() @ first / tokens).float(), "held_out": (second.t() @ second / held_out).float()}
        known = replace(layer.statistics(SIZE, seed), tokens=tokens, held_out_tokens=held_out, **halves)
        found = solve(layer.weight, parse_spec("nvfp4"), AUTO, known)
        true = true_gain(layer, "nvfp4", found)
        shown += decibels(found.rtn_error / found.error) / 4 - true / 4
        told += decibels(found.rtn_error / found.unseen_error) / 4 - true / 4

    assert abs(told) < 0.5 < shown


def test_exact_gradients_are_not_marked_down():
    """Of the same G in both halves nothing was fitted; of one that is no second moment nothing is said."""
    w, g = torch.randn(48, 32), Layer.make(1, 48, 1.0).hessian
    fmt = parse_spec("int8")

    trial = Trial(0.5, 0.5)
    assert trial.along_rows(row_shares(w, fmt, g, g)).excess == 1.0
    assert row_shares(w, fmt, g, g)[0] < 1
    assert row_shares(w, fmt, g - 2 * torch.ones(48, 48), g) == (1.0, 1.0)
    assert trial.along_rows(row_shares(w, fmt, Layer.make(1, 48).statistics(24).hessian, g)).excess > 1.05
