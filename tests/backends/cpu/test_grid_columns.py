"""gptq_columns, descent_columns and refit_unit on the CPU come to what eager comes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import select, use_backend
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.formats.grid import Grid
from lowbit.numerics.levels import E2M1, E4M3, E5M2, IntegerLevels
from lowbit.ops.columns import descent_columns, gptq_columns, refit_unit
from tests.support import gaussian
from tests.support.grids import exact, exact_grid

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

LEVELS = [IntegerLevels(-8, 7), IntegerLevels(0, 15), IntegerLevels(-127, 127), E2M1, E4M3, E5M2]
SIZES = [(1, 1), (2, 63), (7, 65), (64, 200), (100, 24)]  # columns, rows


def rounded(grid: Grid, backend: str, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Values and errors by gptq_columns, of all columns of a grid in an order of their own."""
    count = grid.target.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    values, error = torch.full_like(grid.target, 7.0), torch.full_like(grid.target, 7.0)
    with use_backend(backend):
        gptq_columns(grid, order, grid.target[order], lower, values, error)
    return values, error


def moved(grid: Grid, backend: str, hessian: Tensor, first: int, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Values and slopes by descent_columns, of the columns from `first` on, which begin at the levels' middle."""
    start = torch.stack([grid.nearest(torch.zeros_like(row), k) for k, row in enumerate(grid.target)])[first:]
    slope = slope.clone()
    with use_backend(backend):
        descent_columns(grid, first, slope, hessian, start)
    return start, slope


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_exact_sums_give_equal_values(levels, zero):
    """Where float32 rounds no sum, the values, errors and slopes are eager's, bit for bit, ties and zero steps too."""
    for count, n in SIZES:
        grid = exact_grid(levels, count, n, 16 if count > 16 else 3, zero=zero)
        factor = exact(count, count, -2, 2, 0.25, 4).tril(-1) * (torch.rand(count, count) < 4 / count)
        square = torch.full((count, 2 * count), torch.nan)
        square[:, :count] = factor
        for found, expected in zip(
            rounded(grid, "cpu", square[:, :count]), rounded(grid, "eager", factor), strict=True
        ):
            assert torch.equal(found, expected)

        first = 1 if count > 2 else 0
        square[:, :count] = factor + factor.t() + torch.diag(torch.exp2(exact(1, count, 0, 1, 1.0, 5)[0]))
        hessian = square[first:, first:count]
        slope = exact(count - first, n, -64, 64, 2**-5, 6)
        pairs = zip(
            moved(grid, "cpu", hessian, first, slope), moved(grid, "eager", hessian.clone(), first, slope), strict=True
        )
        for found, expected in pairs:
            assert torch.equal(found, expected)


def refitted(grid: Grid, backend: str, hessian: Tensor, slope: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Values, slopes, steps, divisors (and zeros) after refit_unit of all units in turn, in one block."""
    own = replace(grid, step=grid.step.clone(), zero=None if grid.zero is None else grid.zero.clone())
    slope, values = slope.clone(), values.clone()
    with use_backend(backend):
        for start in range(0, values.shape[0], grid.columns):
            refit_unit(own, start, min(start + grid.columns, values.shape[0]), slope, hessian, 0, values)
    found = (values, slope, own.step, own.divisor)
    return found if own.zero is None else (*found, own.zero)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("levels", [IntegerLevels(-8, 7), E2M1], ids=str)
def test_refitted_steps_are_the_same(levels, zero):
    """Steps, zeros, values and slopes are eager's but for the last bits of sums, snapped to 1/16 or stored as is."""

    def snap(step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """To sixteenths, between which a sum's last bit seldom decides."""
        return (step * 16).round() / 16, None if zero is None else (zero * 16).round() / 16

    for count, n, columns in ((1, 1, 1), (7, 65, 3), (64, 200, 16), (100, 24, 100)):
        x = gaussian(2 * count + 8, count, seed=5)
        hessian = x.t() @ x / x.shape[0]
        for stored in (snap, None):
            grid = exact_grid(levels, count, n, columns, zero=zero)
            grid = grid if stored is None else replace(grid, snap=stored)
            values = torch.stack([grid.nearest(row, k) for k, row in enumerate(grid.target)])
            slope = hessian @ (grid.target - values)
            found = refitted(grid, "cpu", hessian, slope, values)
            expected = refitted(grid, "eager", hessian, slope, values)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            assert count == 1 or not torch.equal(found[2], grid.step)
            assert torch.equal(found[2] == 0, found[3] == torch.inf)


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3(granularity=row)", "nvfp4", "awq_w4a16", "svdquant_w4a4", "wna16"])
def test_weights_get_the_same_codes(spec):
    """On Gaussian weights whose sums are rounded, all but one value in a thousand are eager's."""
    fmt, w = parse_spec(spec), gaussian(300, 64)
    grid = fmt.grid(fmt.prepared(w, 0, 300, "w"), {k: v for k, v in fmt.quantize(w).items() if k != "qdata"})
    x = gaussian(256, 64, seed=1) @ gaussian(64, 64, seed=2)
    hessian = x.t() @ x / 256
    root = torch.linalg.cholesky(hessian)
    lower = root / root.diagonal()
    slope = hessian @ grid.target
    for run in (
        lambda backend: rounded(grid, backend, lower)[0],
        lambda backend: moved(grid, backend, hessian, 0, slope)[0],
    ):
        found, expected = run("cpu"), run("eager")
        assert (found == expected).float().mean() > 0.999
        assert len(expected.unique()) > 15


def test_threads_change_nothing():
    """One thread and four give the same bits."""
    grid = exact_grid(E4M3, 64, 1000, 16, zero=False)
    lower = gaussian(64, 64).tril(-1) * 0.1
    hessian = lower + lower.t() + 2 * torch.eye(64)
    slope = gaussian(64, 1000, seed=3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append((*rounded(grid, "cpu", lower), *moved(grid, "cpu", hessian, 0, slope)))
    finally:
        torch.set_num_threads(before)
    for one, four in zip(*found, strict=True):
        assert torch.equal(one, four)


def test_no_rows_are_no_work():
    """A weight without rows is rounded to nothing."""
    grid = exact_grid(E2M1, 4, 0, 4, zero=False)

    assert rounded(grid, "cpu", torch.eye(4))[0].shape == (4, 0)


def test_what_it_does_not_take_is_refused():
    """Other roundings, dtypes and gaps are named, and eager takes them."""

    class Coarse(Grid):
        """A grid with a rounding of its own."""

    grid = exact_grid(E2M1, 4, 32, 4, zero=True)
    coarse = Coarse(grid.target, grid.step, grid.levels, 4)
    double = replace(grid, target=grid.target.double())
    gaps = replace(grid, target=torch.zeros(4, 64)[:, ::2])
    for other, why in ((coarse, "rounding of its own"), (double, "float32"), (gaps, "gaps")):
        args = (other, 0, torch.zeros(4, 32), torch.eye(4), torch.zeros(4, 32))
        with use_backend("cpu"), pytest.raises(UnsupportedError, match=why):
            descent_columns(*args)
        assert select("descent_columns", "*", "", "cpu", args).backend == "eager"
    for other, why in ((coarse, "rounding of its own"), (replace(grid, rows=2), "units of 2 rows")):
        args = (other, 0, 4, torch.zeros(4, 32), torch.eye(4), 0, torch.zeros(4, 32))
        with use_backend("cpu"), pytest.raises(UnsupportedError, match=why):
            refit_unit(*args)
    wide = (grid, 0, 4, torch.zeros(300, 32), torch.eye(300), 0, torch.zeros(300, 32))
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="300 columns"):
        refit_unit(*wide)
    order = torch.arange(8)[::2]
    args = (grid, order, torch.zeros(4, 32), torch.eye(4), torch.zeros(8, 32), torch.zeros(4, 32))
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="gaps"):
        gptq_columns(*args)
