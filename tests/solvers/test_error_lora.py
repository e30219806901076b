"""The low-rank correction of what quantization lost: the best there is, and never a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import SolverError
from lowbit.formats import parse_spec
from lowbit.solvers import Statistics
from lowbit.solvers.curvature import energy, second_moments, shrinkage
from lowbit.solvers.error_lora import error_lora
from tests.support import gaussian


def power_law(k: int, seed: int = 7) -> torch.Tensor:
    """Samples [4096, K] with a falling spectrum and a mean."""
    basis, _ = torch.linalg.qr(gaussian(k, k, seed=seed))
    x = gaussian(4096, k, seed=seed + 1) * torch.arange(1, k + 1).float().pow(-0.6) @ basis.t()
    return x + 0.3 * gaussian(1, k, seed=seed + 2)


def known_of(x: torch.Tensor) -> Statistics:
    """Second moments and mean of some samples."""
    return Statistics(hessian=x.t() @ x / len(x), tokens=len(x), mean=x.mean(0))


def rounding_error(n: int, k: int, spec: str = "awq_w4a16") -> torch.Tensor:
    """What rounding a Gaussian weight loses."""
    fmt, w = parse_spec(spec), gaussian(n, k)
    return w - fmt.dequantize(fmt.quantize(w), (n, k), torch.float32)


def left(error: torch.Tensor, down: torch.Tensor, up: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """The share of tr(E H E^T) that a correction leaves."""
    return energy(error - up @ down, hessian) / energy(error, hessian)


@pytest.mark.parametrize("shape", [(96, 128), (192, 64)])
def test_it_is_the_truncated_svd_of_the_whitened_error(shape):
    """What is left is that of the exact SVD of E L with H = L L^T, within half a percent."""
    error, known = rounding_error(*shape), known_of(power_law(shape[1]))
    h = second_moments(known.hessian, shrinkage(known.tokens, shape[1]), None)
    singular = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(h.double())).square()
    found = left(error, *error_lora(error, 12, known), h)

    assert found == pytest.approx(float(singular[12:].sum() / singular.sum()), rel=5e-3)


def test_without_statistics_it_is_the_svd_of_the_error():
    """With H unknown, the squares of the error count alone."""
    error = rounding_error(96, 128)
    singular = torch.linalg.svdvals(error).square()

    assert left(error, *error_lora(error, 12), None) == pytest.approx(
        float(singular[12:].sum() / singular.sum()), rel=5e-3
    )


def test_second_moments_make_a_rank_worth_more():
    """On other samples, a correction made with H leaves less of the output's error than one made without."""
    error, known = rounding_error(96, 128), known_of(power_law(128))
    other = power_law(128)[2048:]
    unseen = other.t() @ other / len(other)

    assert left(error, *error_lora(error, 12, known), unseen) < 0.8 * left(error, *error_lora(error, 12), unseen)


@pytest.mark.parametrize("seed", range(5))
def test_it_never_hurts_whatever_the_input(seed):
    """The correction projects the error, so no input at all loses by it, statistics of another one included."""
    error, known = rounding_error(64, 128), known_of(power_law(128, seed=seed))
    down, up = error_lora(error, 8, known)
    x = gaussian(100, 128, seed=seed + 50)
    before, after = x @ error.t(), x @ (error - up @ down).t()

    assert bool((after.norm(dim=1) <= before.norm(dim=1) * (1 + 1e-5)).all())


@pytest.mark.parametrize("offset", [0.0, 0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("full", [True, False])
def test_beside_a_bias_it_helps_whatever_the_mean(offset, full):
    """What is left of E (x - m) on the samples is less, be the mean nothing but noise or nearly all of the input."""
    x = power_law(128)
    x = x - x.mean(0) + 0.01 * gaussian(1, 128, seed=5) + offset * gaussian(1, 128, seed=6)
    error, known = rounding_error(96, 128), known_of(x)
    known = known if full else replace(known, hessian=known.hessian.diagonal().clone())
    down, up = error_lora(error, 12, known, mean_is_corrected=True)
    before = (x - known.sure_mean) @ error.t()

    assert float((before - x @ (up @ down).t()).norm() / before.norm()) ** 2 < (0.85 if full else 0.98)


def test_beside_a_bias_it_is_the_least_squares_correction():
    """With all ranks nothing that a factor of x could take is left: C (V + m m^T) = E V, V shrunk as elsewhere."""
    error, known = rounding_error(48, 64), known_of(power_law(64))
    mean = known.sure_mean
    v = second_moments(known.hessian - torch.outer(mean, mean), shrinkage(known.tokens, 64), None).double()
    down, up = error_lora(error, 64, known, mean_is_corrected=True)
    wanted = error.double() @ v

    found = (up @ down).double() @ (v + torch.outer(mean, mean).double())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_beside_a_bias_a_matrix_that_is_not_definite_counts_by_its_diagonal():
    """Moments without a triangular factor do not end in an error or in NaN."""
    error = rounding_error(32, 64)
    known = Statistics(hessian=torch.full((64, 64), -1.0).fill_diagonal_(1.0), tokens=9, mean=torch.full((64,), 0.9))
    down, up = error_lora(error, 12, known, mean_is_corrected=True)

    assert bool(down.isfinite().all() & up.isfinite().all())


@pytest.mark.parametrize("mean", [1.0, 1e-12, 1e-25])
@pytest.mark.parametrize("full", [True, False])
def test_beside_a_bias_inputs_that_do_not_vary_ask_for_nothing(mean, full):
    """One token, or always the same: the bias does it all, and finite factors leave its output as it is."""
    error, x = rounding_error(32, 64), torch.full((1, 64), mean)
    known = known_of(x) if full else Statistics(hessian=x[0].square(), tokens=1, mean=x[0])
    down, up = error_lora(error, 12, known, mean_is_corrected=True)

    assert bool(down.isfinite().all() & up.isfinite().all())
    if float(known.sure_mean[0]):
        assert float((up @ (down @ x[0])).norm()) < 1e-3 * float((error @ x[0]).norm())


def test_a_mean_whose_square_is_lost_is_taken_for_noise():
    """Means too small for their square to be a number give zeros and no NaN; the others stay."""
    x = torch.tensor([[2.0, 1e-25, 0.0]])

    assert known_of(x).sure_mean.tolist() == [2.0, 0.0, 0.0]


def test_a_diagonal_counts():
    """With the second moments of single channels, the large ones are corrected first."""
    error = rounding_error(96, 128)
    diagonal = torch.linspace(-3, 3, 128).exp()

    assert left(error, *error_lora(error, 12, Statistics(hessian=diagonal, tokens=9)), diagonal) < left(
        error, *error_lora(error, 12), diagonal
    )


def test_extremes():
    """No error, a rank beyond the matrix, tiny and huge errors: finite factors that do what they can."""
    zero = error_lora(torch.zeros(8, 16), 4)
    full = error_lora(gaussian(8, 16), 99)
    tiny = error_lora(gaussian(8, 16) * 1e-30, 8)

    assert all(bool((part == 0).all()) for part in (zero[1] @ zero[0],))
    assert full[0].shape == (8, 16)
    torch.testing.assert_close(full[1] @ full[0], gaussian(8, 16), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny[1] @ tiny[0], gaussian(8, 16) * 1e-30, rtol=1e-3, atol=1e-35)


def test_bad_requests_are_named():
    """A rank below 1 and the statistics of another layer are refused."""
    with pytest.raises(SolverError, match=r"blocks.0: the rank of a correction is 0"):
        error_lora(gaussian(8, 16), 0, where="blocks.0")
    with pytest.raises(SolverError, match="for K = 4"):
        error_lora(gaussian(8, 16), 2, Statistics(hessian=torch.ones(4), tokens=3))
