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


needs_bf16 = pytest.mark.skipif(not native.module().can_bf16_dots(), reason="no products of bfloat16")


def summed_bf16(x: Tensor, total: Tensor | None = None, threads: int = 1) -> Tensor:
    """The same of rows of bfloat16 by the instruction for them, whether or not it is fast here."""
    k = x.shape[1]
    total = torch.zeros(k, k) if total is None else total.clone()
    native.module().add_second_moment_bf16(total.data_ptr(), x.data_ptr(), *x.shape, threads)
    return total.triu()


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


@needs_bf16
@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_rows_of_bfloat16_are_multiplied_exactly(rows, k):
    """Whole numbers are summed to the bit, any others as float32 does; an odd last row counts once."""
    whole = torch.randint(-100, 101, (rows, k), generator=torch.Generator().manual_seed(rows + k)).bfloat16()
    assert torch.equal(summed_bf16(whole), (whole.double().t() @ whole.double()).float().triu())
    x = (gaussian(rows, k) * torch.logspace(-8, 6, k)).bfloat16()
    found, exact = summed_bf16(x).double(), (x.double().t() @ x.double()).triu()
    size = exact.diagonal().sqrt()
    assert float(((found - exact) / (size[:, None] * size)).abs().max()) < 1e-6


@needs_bf16
def test_sums_of_bfloat16_go_on_and_keep_what_is_broken_apart():
    """As those of float32 do, for any number of threads; a NaN or an infinity reaches its column and no other."""
    x, total = gaussian(700, 150).bfloat16(), gaussian(150, 150)
    begun = summed_bf16(x, total)
    assert torch.allclose(begun, summed(x.float(), total), atol=1e-3)
    for threads in (2, 3, 7):
        assert torch.equal(summed_bf16(x, total, threads), begun)
    x = gaussian(201, 40).bfloat16()
    x[200, 7], x[10, 20] = torch.nan, torch.inf
    broken = torch.zeros(40, 40, dtype=torch.bool)
    broken[[7, 20], :] = broken[:, [7, 20]] = True
    assert torch.equal(~summed_bf16(x).isfinite(), broken.triu())


def test_rows_of_bfloat16_need_no_instruction_for_them():
    """Through dispatch they give what they give as float32, on every set."""
    x, totals = gaussian(300, 64).bfloat16(), (torch.zeros(64, 64), torch.zeros(64, 64))
    add_second_moment(totals[0], x)
    add_second_moment(totals[1], x.float())
    assert torch.allclose(totals[0].triu(), totals[1].triu(), rtol=1e-5, atol=1e-4)
    if not native.module().can_bf16_dots():
        with pytest.raises((ValueError, RuntimeError), match="no products of bfloat16"):
            summed_bf16(x)


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
