"""G in blocks along its diagonal: solved and judged as the whole matrix with zeros outside of the blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import SolverError
from lowbit.formats import parse_spec
from lowbit.numerics.block_diagonal import blocks, divided
from lowbit.smoothing.choice import rescaled_outputs
from lowbit.solvers import refinements, solve, solver
from lowbit.solvers.curvature import energy, output_loss
from lowbit.solvers.refinement import Unrefined, refine
from lowbit.solvers.row_coupling import refine_coupled
from lowbit.solvers.unseen import row_shares
from tests.solvers.test_row_coupling import gradients, known_of
from tests.support.layers import Layer


def dense(matrix):
    """The whole matrix, zero outside of the blocks."""
    return torch.block_diag(*(block for _, block in blocks(matrix)))


@pytest.mark.parametrize(("n", "k"), [(64, 24), (24, 64)])
@pytest.mark.parametrize("known", ["full", "diagonal", "none"])
def test_errors_are_those_of_the_whole_matrix(n, k, known):
    """tr(G E H E^T) is a sum over the blocks, whatever is known of H."""
    x, g = torch.randn(n, k, generator=torch.Generator().manual_seed(0)), divided(gradients(n), 4)
    h = {"full": gradients(k), "diagonal": gradients(k).diagonal(), "none": None}[known]

    assert energy(x, h, g) == pytest.approx(energy(x, h, dense(g)), rel=1e-5)


@pytest.mark.parametrize("spec", ["int8", "awq_w4a16(group_size=32)", "fp8_e4m3", "int8(granularity=block)", "wna16"])
@pytest.mark.parametrize(("n", "count"), [(512, 2), (1024, 8), (1280, 4)])
def test_rows_of_a_block_make_up_for_each_other(spec, n, count):
    """The error falls as far as with the whole matrix, and below that of rows solved one by one."""
    layer, fmt, g = Layer.make(n, 128), parse_spec(spec), divided(gradients(n), count)
    w, h, steps = layer.weight, layer.hessian, [refinements()["gptq"]]
    given = Unrefined(w, fmt, solver("rtn")(w, fmt), h, 0.0)

    alone = output_loss(w, fmt, refine(given, steps), h, g)
    found, whole = (output_loss(w, fmt, refine_coupled(given, steps, one), h, g) for one in (g, dense(g)))

    assert found < 0.95 * alone
    assert found == pytest.approx(whole, rel=0.03)


def test_pieces_of_rows_are_solved_in_their_places(monkeypatch):
    """A weight of many pieces, of which the last is shorter, comes out as one of a single piece."""
    layer, fmt, g = Layer.make(640, 64), parse_spec("int8"), divided(gradients(640), 4)
    given = Unrefined(layer.weight, fmt, solver("rtn")(layer.weight, fmt), layer.hessian, 0.0)
    steps = [refinements()["gptq"]]
    once = refine_coupled(given, steps, g)

    monkeypatch.setattr("lowbit.solvers.refinement.DRAFT_ELEMENTS", 64 * 300)
    pieces = refine_coupled(given, steps, g)

    for name, part in once.items():
        assert torch.equal(part, pieces[name]), name


def test_many_blocks_are_solved_a_few_rows_at_a_time():
    """Of more blocks than rows are taken at once, one row each."""
    layer, fmt, g = Layer.make(1024, 32), parse_spec("int8"), divided(gradients(1024), 512)
    given = Unrefined(layer.weight, fmt, solver("rtn")(layer.weight, fmt), layer.hessian, 0.0)

    found = refine_coupled(given, [refinements()["gptq"]], g)

    plain = refine(given, [refinements()["gptq"]])
    assert output_loss(layer.weight, fmt, found, layer.hessian, g) < output_loss(
        layer.weight, fmt, plain, layer.hessian, g
    )


def test_what_is_expected_of_other_inputs_is_that_of_the_whole_matrix():
    """`row_shares` of blocks and of the matrix with zeros between them are the same but for rounding."""
    layer, fmt = Layer.make(128, 64), parse_spec("int8")
    one, other = divided(gradients(128), 4), divided(gradients(128, seed=6), 4)

    found, whole = (row_shares(layer.weight, fmt, *some) for some in ((one, other), (dense(one), dense(other))))

    assert found == pytest.approx(whole, rel=1e-3)
    assert found[0] < found[1] < 1.5


@pytest.mark.parametrize("spec", ["int8", "nvfp4", "svdquant_w4a4(rank=8)", "fp8_e4m3(granularity=block)"])
def test_solving_with_blocks_gains(spec):
    """`solve` lowers the error of the model's output with blocks of G, and says the error it was judged by."""
    layer, fmt, g = Layer.make(256, 256), parse_spec(spec), divided(gradients(256), 2)

    alone, found = (solve(layer.weight, fmt, "auto", one) for one in (known_of(layer), known_of(layer, g)))

    assert found.note == ""
    assert output_loss(layer.weight, fmt, found.parts, layer.hessian, g) < 0.97 * output_loss(
        layer.weight, fmt, alone.parts, layer.hessian, g
    )


def test_a_bias_is_judged_by_blocks():
    """The mean error, which the bias takes, is left out of the error as for the whole matrix."""
    layer, fmt, g = Layer.make(256, 64, mean=2.0), parse_spec("int8(activations=none)"), divided(gradients(256), 2)

    found, whole = (
        solve(layer.weight, fmt, "scale_search+gptq+bias", known_of(layer, one), has_bias=True) for one in (g, dense(g))
    )

    assert found.bias is not None
    assert found.rtn_error == pytest.approx(whole.rtn_error, rel=1e-5)
    assert found.error == pytest.approx(whole.error, rel=0.05)


def test_rescaled_rows_have_rescaled_gradients():
    """Of a layer whose last rows are multiplied, G is divided at these, in whichever block they are."""
    g, scale = divided(gradients(32), 4), torch.rand(20) + 0.5
    known = replace(known_of(Layer.make(32, 32)), output_hessian=g, output_held_out=g)

    found = rescaled_outputs(known, scale).output_hessian
    whole = rescaled_outputs(replace(known, output_hessian=dense(g)), scale).output_hessian

    torch.testing.assert_close(dense(found), whole)


@pytest.mark.parametrize("shape", [(3, 21, 21), (2, 31, 31), (2, 32, 16), (64,), (2, 2, 16, 16)])
def test_blocks_of_another_layer_are_one_error(shape):
    """What is not N rows in a power of two of square blocks is refused by the layer's name."""
    layer = Layer.make(64, 64)

    with pytest.raises(SolverError, match=r"block\.3: the statistics hold a"):
        solve(layer.weight, parse_spec("int8"), "auto", known_of(layer, torch.ones(shape)), where="block.3")


def test_the_half_held_out_is_checked_by_itself():
    """Without the other half it is still to be that of the layer's rows."""
    layer = Layer.make(64, 64)
    known = replace(known_of(layer), output_hessian=None, output_held_out=torch.ones(3, 3))

    with pytest.raises(SolverError, match=r"output_held_out of shape \[3, 3\], expected \[64, 64\]"):
        solve(layer.weight, parse_spec("int8"), "auto", known)
