"""The triangular factor made by blocks: LAPACK's, and None where that fails too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.cholesky import cholesky

SIZES = (0, 1, 64, 384, 385, 576, 700)  # one block, two that are even and uneven, more


def second_moments(k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of channels that fall off, as those of layers do."""
    x = torch.randn(4 * k, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    x *= torch.arange(1, k + 1).double().rsqrt()
    return (x.t() @ x / max(4 * k, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", SIZES)
def test_it_is_the_factor(k: int, dtype: torch.dtype) -> None:
    """Within the rounding errors of its dtype, and what it was given stays."""
    matrix = second_moments(k, dtype)
    given = matrix.clone()
    lower, wanted = cholesky(matrix), torch.linalg.cholesky(matrix.double())
    assert lower is not None
    assert (lower.dtype, lower.shape) == (dtype, (k, k))
    assert torch.equal(matrix, given)
    assert lower.t().is_contiguous()
    assert not bool(lower.triu(1).any())
    allowed = 1e-5 if dtype == torch.float32 else 1e-13
    assert float((lower.double() - wanted).norm()) <= allowed * max(float(wanted.norm()), 1.0)


@pytest.mark.parametrize("strided", ["transposed", "part"])
def test_strides_do_not_matter(strided: str) -> None:
    """A transposed matrix or a part of a larger one gives the same."""
    matrix = second_moments(500)
    if strided == "transposed":
        other = matrix.t().contiguous().t()
    else:
        other = torch.zeros(600, 700)[50:550, 100:600].copy_(matrix)
    assert not other.is_contiguous()
    assert torch.allclose(cholesky(other), cholesky(matrix), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", [0, 191, 192, 450, 699])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan])
def test_none_for_what_is_not_positive_definite(at: int, value: float) -> None:
    """In the first block, at its end, after it, in the last one."""
    matrix = second_moments(700)
    matrix[at, at] = value
    assert int(torch.linalg.cholesky_ex(matrix).info) > 0
    assert cholesky(matrix) is None


def test_the_same_for_any_number_of_threads() -> None:
    """But for the order of sums."""
    matrix, before = second_moments(700), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cholesky(matrix)
        torch.set_num_threads(2)
        both = cholesky(matrix)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(alone, both, rtol=1e-4, atol=1e-6)
