"""Rows that make up for each other gain what the theory says, in every format, and never by trusting a wrong G."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats import Format, Parts, formats, parse_spec
from lowbit.solvers import Statistics, refinements, solve, solver
from lowbit.solvers.curvature import output_loss
from lowbit.solvers.refinement import Unrefined, refine
from lowbit.solvers.row_coupling import ROWS, refine_coupled, shrunk_outputs
from lowbit.solvers.solve import Problem
from lowbit.solvers.unseen import Trial
from tests.support.layers import Layer, power_law


def gradients(n: int, alpha: float = 1.0, seed: int = 5) -> Tensor:
    """G [n, n] with a power law of eigenvalues."""
    root = power_law(n, alpha, seed)
    return (root @ root.mT).float()


def known_of(layer: Layer, outputs: Tensor | None = None) -> Statistics:
    """Exact statistics of a layer's input and, in both halves, of the gradient at its output."""
    exact = replace(layer.exact(), held_out=layer.hessian, held_out_tokens=layer.exact().tokens)
    return replace(exact, output_hessian=outputs, output_held_out=outputs)


def coupled_error(w: Tensor, fmt: Format, parts: Parts, h: Tensor, g: Tensor) -> float:
    """tr(G E H E^T) in float64."""
    missed = (fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32) - w).double()
    return float(torch.einsum("ij,jk,kl,il->", g.double(), missed, h.double(), missed))


def theory(outputs: Tensor) -> float:
    """10 log10(tr G / tr D) in dB for G = L D L^T by blocks of `ROWS`, rows by rising weight."""
    order = outputs.diagonal().argsort()
    lower = torch.linalg.cholesky(outputs[order][:, order].double())
    blocks = [lower[a : a + ROWS, a : a + ROWS] for a in range(0, len(lower), ROWS)]
    left = sum(float((block @ block.mT).trace()) for block in blocks)
    return 10 * math.log10(float(outputs.double().trace()) / left)


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3(granularity=row)", "fp8_e4m3", "awq_w4a16", "nvfp4", "mxfp8"])
@pytest.mark.parametrize(("alpha", "least"), [(0.5, 0.12), (1.0, 0.8), (2.0, 2.0)])
def test_the_gain_is_the_theoretical_one(spec, alpha, least):
    """With G known the error of the model's output falls by 10 log10(tr G / tr D), within 0.4 dB, beyond gptq's."""
    layer, fmt, g = Layer.make(256, 128), parse_spec(spec), gradients(256, alpha)
    w, h, steps = layer.weight, layer.hessian, [refinements()["gptq"]]
    start = solver("rtn")(w, fmt)

    given = Unrefined(w, fmt, start, h, 0.0)
    alone = refine(given, steps)
    coupled = refine_coupled(given, steps, g)

    seen = shrunk_outputs(g)
    gain = 10 * math.log10(coupled_error(w, fmt, alone, h, seen) / coupled_error(w, fmt, coupled, h, seen))
    assert gain == pytest.approx(theory(seen), abs=0.4)
    assert gain > least


@pytest.mark.parametrize(
    "spec",
    [
        *(name for name, kind in formats().items() if kind().encodable and not kind().pre_quant_scale),
        "nvfp4(row_global_scale=True)",
    ],
)
def test_every_format_gains(spec):
    """`solve` with gradients loses less of the model's output than without, whatever shares scales with what."""
    layer, fmt, g = Layer.make(256, 256), parse_spec(spec), gradients(256)

    alone = solve(layer.weight, fmt, "auto", known_of(layer))
    found = solve(layer.weight, fmt, "auto", known_of(layer, g))

    assert found.note == ""
    assert output_loss(layer.weight, fmt, found.parts, layer.hessian, g) < 0.97 * output_loss(
        layer.weight, fmt, alone.parts, layer.hessian, g
    )


@pytest.mark.parametrize("spec", ["fp8_e4m3(granularity=block)", "int8(granularity=block)", "fp8_e4m3"])
def test_rows_that_share_scales_keep_them(spec):
    """Scales of blocks of rows stay one a block, and are those that the codes were chosen with."""
    layer, g = Layer.make(300, 256), gradients(300)
    fmt = parse_spec(spec)
    start = solver("rtn")(layer.weight, fmt)

    given = Unrefined(layer.weight, fmt, start, layer.hessian, 0.2)
    found = refine_coupled(given, [refinements()["gptq"]], g)

    fmt.check(found, (300, 256))
    for name in found.keys() - {"qdata"}:
        assert torch.equal(found[name], start[name])
    before = coupled_error(layer.weight, fmt, start, layer.hessian, g)
    assert coupled_error(layer.weight, fmt, found, layer.hessian, g) < 0.5 * before


@pytest.mark.parametrize("rows", [1, 7, 32, 33, 100])
def test_any_number_of_rows(rows):
    """The last, shorter piece of rows is solved, too, and codes end up in their own rows."""
    layer, fmt = Layer.make(rows, 64), parse_spec("int8")

    found = solve(layer.weight, fmt, "auto", known_of(layer, gradients(rows) + torch.eye(rows)))

    near = fmt.dequantize(found.parts, (rows, 64), torch.float32) - layer.weight
    assert float(near.abs().max()) < 4 * float(layer.weight.abs().max()) / 127
    assert found.error < found.rtn_error


def test_rows_without_a_part_in_each_other_are_solved_as_before():
    """With G the identity the result is that of H alone."""
    layer, fmt = Layer.make(96, 64), parse_spec("awq_w4a16(group_size=32)")
    exact = known_of(layer)

    alone, found = (solve(layer.weight, fmt, "auto", one) for one in (exact, known_of(layer, torch.eye(96))))

    assert found.error == pytest.approx(alone.error, rel=1e-3)
    assert found.rtn_error == pytest.approx(alone.rtn_error, rel=1e-5)


def test_the_error_is_that_of_the_models_output():
    """`error` and `rtn_error` are tr(G E H E^T) / tr(G W H W^T) with the held-out halves of both."""
    layer, fmt = Layer.make(64, 64), parse_spec("int8(activations=none)")
    other = gradients(64, 1.5, seed=9)
    known = replace(known_of(layer, gradients(64)), output_held_out=other)

    found = solve(layer.weight, fmt, "gptq", known)

    w = layer.weight
    signal = float(torch.einsum("ij,jk,kl,il->", *(x.double() for x in (other, w, layer.hessian, w))))
    assert found.error == pytest.approx(coupled_error(w, fmt, found.parts, layer.hessian, other) / signal, rel=1e-3)


def test_gradients_of_another_kind_of_text_cannot_make_it_worse_than_rounding():
    """Where the held-out gradients contradict those solved with, the layer is solved without them or rounded."""
    fmt = parse_spec("int8(activations=none)")
    for seed in range(8):
        layer = Layer.make(64, 64, seed=seed)
        axis = torch.randn(64, 1, generator=torch.Generator().manual_seed(seed))
        narrow, other = axis @ axis.mT + 1e-3 * torch.eye(64), torch.ones(64, 64) + 1e-3 * torch.eye(64)
        known = replace(known_of(layer, narrow), output_held_out=other)

        found = solve(layer.weight, fmt, "auto", known)

        assert found.error <= found.rtn_error


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.eye(63), "output_hessian of shape [63, 63], expected [64, 64]"),
        (torch.full((64, 64), torch.nan), "output_hessian with NaN or infinity"),
    ],
)
def test_unusable_gradients_are_one_error(wrong, said):
    """Those of another layer, or that are not finite, are refused by the layer's name."""
    layer = Layer.make(64, 64)

    with pytest.raises(SolverError) as caught:
        solve(layer.weight, parse_spec("int8"), "auto", known_of(layer, wrong), where="block.3")

    assert said in str(caught.value)
    assert "block.3" in str(caught.value)


def test_what_is_no_second_moment_is_said():
    """A G that is not positive definite is not used, and the note names it; H still is."""
    layer = Layer.make(64, 64)
    wrong = torch.eye(64) - 2 * torch.ones(64, 64)

    found = solve(layer.weight, parse_spec("int8"), "gptq", known_of(layer, wrong), where="block.3")

    assert found.solver == "scale_search+gptq"
    assert found.note == (
        "rows were solved one by one: block.3: the second moments of the gradient are no positive definite matrix; "
        "calibrate it again"
    )


def test_without_gradients_nothing_is_tried_twice(monkeypatch):
    """A pipeline that loses on the samples held out is run once for each thing it can be run against."""
    layer, fmt, runs = Layer.make(64, 64), parse_spec("int8"), []
    nothing = fmt.quantize(torch.zeros(64, 64))
    monkeypatch.setattr(Problem, "_trial", lambda *_: Trial(1.0, 1.0, 0.2))
    monkeypatch.setattr(Problem, "_refined", lambda *_, outputs=None: runs.append(outputs) or nothing)

    for outputs in (None, torch.eye(64)):
        found = solve(layer.weight, fmt, "scale_search+gptq", known_of(layer, outputs))

        assert "gptq" not in found.solver

    assert [outputs is None for outputs in runs] == [True, False, True]
