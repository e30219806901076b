"""The search for a low rank: steps of its iteration."""

from __future__ import annotations

import pytest
import torch

from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.numerics.low_rank import Products, orthonormal
from tests.support import gaussian


def test_columns_come_in_falling_order_of_singular_values():
    """With all columns in the basis one step gives the singular vectors."""
    m = gaussian(40, 12) * torch.logspace(0, 2, 12)
    basis = orthonormal(gaussian(12, 12, seed=1))
    image = m.t() @ (m @ basis)
    found = Products(image, basis.t() @ image).next_basis()
    values, vectors = torch.linalg.eigh(m.double().t() @ m.double())
    assert bool((values.diff() > 0).all())
    alike = (found.double() * vectors.flip(1)).sum(0).abs()
    assert bool((alike > 0.999).all())


@pytest.mark.parametrize("fmt", [SvdquantW4A4(rank=5), SvdquantW4A4(rank=5, act_unsigned=True)], ids=str)
def test_products_that_are_nearly_nothing_break_no_search(fmt):
    """A few weights among zeros: steps see products from 1 down to below the normal numbers of float32."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(5, 64, generator=generator) * (torch.rand(5, 64, generator=generator) < 0.02)
        w = w.to(torch.float16)
        found = fmt.dequantize(fmt.quantize(w), (5, 64), torch.float32)
        assert (found - w).norm() <= 0.01 * w.float().norm()
