"""add_second_moment on the CPU, by the compiled kernel of each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import select, use_backend
from lowbit.ops.second_moment import add_second_moment
from tests.support import gaussian

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

from lowbit.backends.cpu import native
from lowbit.backends.cpu.add_second_moment import MEASURED, refuses

SIZES = [(1, 1), (2, 3), (127, 15), (128, 16), (129, 17), (255, 48), (300, 49), (1024, 100), (77, 200), (513, 131)]


def summed(x: Tensor, total: Tensor | None = None, threads: int = 1) -> Tensor:
    """The upper triangle of total + x^T x by this instruction set, whether or not dispatch would take it."""
    k = x.shape[1]
    total = torch.zeros(k, k) if total is None else total.clone()
    native.module().add_second_moment(total.data_ptr(), x.data_ptr(), *x.shape, threads)
    return total.triu()


@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_integers_are_summed_exactly(rows, k):
    """Where float32 rounds no sum the result is exact, odd rows and columns too."""
    x = torch.randint(-100, 101, (rows, k), generator=torch.Generator().manual_seed(rows + k)).float()
    assert torch.equal(summed(x), (x.double().t() @ x.double()).float().triu())


@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_any_values_are_summed_as_float32_does(rows, k):
    """Columns of very different sizes, each sum within float32's precision of its channels' sizes."""
    x = gaussian(rows, k) * torch.logspace(-8, 6, k)
    found, exact = summed(x).double(), (x.double().t() @ x.double()).triu()
    size = exact.diagonal().sqrt()
    assert float(((found - exact) / (size[:, None] * size)).abs().max()) < 1e-6


def test_sums_go_on_from_what_is_there_and_do_not_depend_on_threads():
    """Nothing is added for no rows, and nothing is done for no columns."""
    x, total = gaussian(700, 150), gaussian(150, 150)
    begun = summed(x, total)
    assert torch.allclose(begun, total.triu() + summed(x), atol=1e-4)
    for threads in (2, 3, 7):
        assert torch.equal(summed(x, total, threads), begun)
    assert torch.equal(summed(torch.zeros(0, 150), total), total.triu())
    assert summed(torch.zeros(5, 0)).shape == (0, 0)


def test_columns_without_values_give_zeros_and_broken_ones_nan():
    """A NaN or an infinity reaches all sums of its column and no others."""
    x = gaussian(200, 40)
    x[:, 3] = 0
    x[150, 7], x[10, 20] = torch.nan, torch.inf
    found = summed(x)
    broken = torch.zeros(40, 40, dtype=torch.bool)
    broken[[7, 20], :] = broken[:, [7, 20]] = True
    assert torch.equal(~found.isfinite(), broken.triu())
    assert not found[3, 4:7].any()
    assert not found[:4, 3].any()


def test_dispatch_takes_it_where_it_is_faster():
    """Sets that nobody measured leave the sum to PyTorch; so do rows with gaps and other dtypes."""
    x, total = gaussian(300, 64), torch.zeros(64, 64)
    takes = native.isa().startswith(MEASURED)
    assert select("add_second_moment", "*", "", "cpu", (total, x)).backend == ("cpu" if takes else "eager")
    if not takes:
        assert "only measured" in str(refuses(total, x))
        return
    add_second_moment(total, x)
    assert torch.equal(total.triu(), summed(x))
    assert "gaps" in str(refuses(total, gaussian(300, 128)[:, ::2]))
    assert "gaps" in str(refuses(torch.zeros(64, 128)[:, ::2], x))
    assert "float32" in str(refuses(total, x.double()))
    assert "float32" in str(refuses(total.double(), x))


def test_eager_adds_the_same_sum():
    """To float32's precision, in panels."""
    x, total = gaussian(300, 250), gaussian(250, 250)
    expected = total.double() + x.double().t() @ x.double()
    with use_backend("eager"):
        add_second_moment(total, x)
    assert torch.allclose(total.double().triu(), expected.triu(), rtol=1e-5, atol=1e-4)
