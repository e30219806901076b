"""tr(G X H X^T) as solvers measure it."""

from __future__ import annotations

import pytest
import torch

from lowbit.solvers.curvature import energy


def _second_moment(size, generator):
    rows = torch.randn(size + 3, size, generator=generator)
    return rows.t() @ rows / size


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (192, 384), (385, 193), (0, 5)])
@pytest.mark.parametrize("hessian", ["none", "diagonal", "full"])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_energy_is_that_of_the_definition(shape, hessian, coupled):
    """Whatever is known of H and G, in whichever order it is multiplied, in blocks and in their rest."""
    generator = torch.Generator().manual_seed(sum(shape))
    (n, k), x = shape, torch.randn(shape, generator=generator)
    full, g = _second_moment(k, generator), _second_moment(n, generator)
    h = {"none": None, "diagonal": full.diagonal(), "full": full}[hessian]
    dense = {"none": torch.eye(k), "diagonal": full.diagonal().diag(), "full": full}[hessian].double()
    kept = x.clone()

    got = energy(x, h, g if coupled else None)

    across = x.double() @ dense @ x.double().t()
    want = float(((g.double() if coupled else torch.eye(n).double()) * across).sum())
    assert got == pytest.approx(want, rel=1e-5, abs=1e-12)
    assert torch.equal(x, kept)
