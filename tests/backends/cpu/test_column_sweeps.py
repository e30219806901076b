"""gptq_sweep and descent_sweep on the CPU come to what eager's blocks of columns come to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import select, use_backend
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.formats.global_scale import GlobalScale
from lowbit.formats.grid import Grid, Snap
from lowbit.formats.stored_steps import E4m3Steps, FloatSteps, PowerSteps
from lowbit.numerics.levels import E2M1, E4M3, IntegerLevels
from lowbit.ops.columns import descent_sweep, gptq_sweep
from tests.support import gaussian
from tests.support.grids import exact, exact_grid

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

SIZES = [(1, 1), (7, 31), (64, 32), (65, 33), (150, 100), (203, 16)]  # columns, rows
SPECS = (
    "int8",
    "int8(granularity=tensor)",
    "fp8_e4m3(granularity=row)",
    "nvfp4",
    "nvfp4(row_global_scale=True,global_scale_divides=True)",
    "mxfp4",
    "awq_w4a16",
    "svdquant_w4a4",
    "wna16(group_size=32)",
    "wna16(bits=8,group_size=256)",
)


def sparse(count: int, seed: int) -> Tensor:
    """A strictly lower triangular matrix of a few ones and minus ones."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(count, count, generator=generator) < 2 / count
    return torch.where(some, exact(count, count, 0, 1, 2.0, seed) - 1, 0.0).tril(-1)


def rounded(grid: Grid, backend: str, order: Tensor, lower: Tensor) -> Tensor:
    """The values after gptq_sweep."""
    values = torch.full_like(grid.target, 7.0)
    with use_backend(backend):
        gptq_sweep(grid, order, lower, values)
    return values


def swept(grid: Grid, backend: str, hessian: Tensor, values: Tensor, **how: bool) -> tuple[Tensor, ...]:
    """Values, gradients, steps, divisors (and zeros) after descent_sweep, which began with these values."""
    own = replace(grid, step=grid.step.clone(), zero=None if grid.zero is None else grid.zero.clone())
    values, gradient = values.clone(), hessian @ (grid.target - values)
    with use_backend(backend):
        descent_sweep(own, values, gradient, hessian, **how)
    found = (values, gradient, own.step, own.divisor)
    return found if own.zero is None else (*found, own.zero)


def begin(grid: Grid) -> Tensor:
    """The grid's values nearest to its target."""
    return torch.stack([grid.nearest(row, k) for k, row in enumerate(grid.target)])


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("levels", [IntegerLevels(-8, 7), IntegerLevels(-127, 127), E2M1, E4M3], ids=str)
def test_exact_sums_give_equal_values(levels, zero):
    """Where float32 rounds no sum, values and gradients are eager's, bit for bit, ties and zero steps too."""
    for count, n in SIZES:
        grid = exact_grid(levels, count, n, 16 if count > 16 else 3, zero=zero)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        lower = sparse(count, 4)
        for arranged in (lower, lower.t().contiguous().t()):
            assert torch.equal(rounded(grid, "cpu", order, arranged), rounded(grid, "eager", order, lower))
        hessian = lower + lower.t() + torch.diag(torch.exp2(exact(1, count, 0, 1, 1.0, 5)[0]))
        for last in (False, True):
            how = {"codes": True, "scales": False, "last": last}
            found, expected = (swept(grid, one, hessian, begin(grid), **how) for one in ("cpu", "eager"))
            assert torch.equal(found[0], expected[0])
            assert last or torch.equal(found[1], expected[1])
            assert torch.equal(found[2], grid.step)


def of_weight(spec: str, n: int, k: int) -> tuple[Grid, Tensor]:
    """The grid of a Gaussian weight in a format, and second moments of an input whose channels go together."""
    fmt, w = parse_spec(spec), gaussian(n, k)
    params = {name: part for name, part in fmt.quantize(w).items() if name != "qdata"}
    x = gaussian(2 * k, k, seed=1) @ (torch.eye(k) + 0.3 * gaussian(k, k, seed=2) / k**0.5)
    return fmt.grid(fmt.prepared(w, 0, n, "w"), params), x.t() @ x / x.shape[0]


def error(grid: Grid, hessian: Tensor, values: Tensor) -> Tensor:
    """tr(E H E^T) of each row, float64 [n]."""
    missed = (grid.target - values).double()
    return (missed * (hessian.double() @ missed)).sum(0)


@pytest.mark.parametrize("spec", SPECS)
def test_weights_come_to_what_eager_comes_to(spec):
    """On Gaussian weights the first codes are eager's but for one in a thousand, and so is the error that is left."""
    grid, hessian = of_weight(spec, 40, 512)
    root = torch.linalg.cholesky(hessian)
    order, lower = torch.arange(512), root / root.diagonal()
    values = rounded(grid, "cpu", order, lower)
    assert (values == rounded(grid, "eager", order, lower)).float().mean() > 0.999
    before = error(grid, hessian, values)
    scales = grid.columns <= 256
    for how in ({"codes": True, "scales": False}, {"codes": False, "scales": True}, {"codes": True, "scales": True}):
        if how["scales"] and not scales:
            continue
        found, expected = (swept(grid, one, hessian, values, **how, last=False) for one in ("cpu", "eager"))
        after, wanted = error(grid, hessian, found[0]), error(grid, hessian, expected[0])
        assert bool((after <= before * 1.0001).all())
        assert float(after.sum() / wanted.sum()) == pytest.approx(1, abs=2e-3)
        slope = hessian @ (grid.target - found[0])
        torch.testing.assert_close(found[1], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max() + 1))
        assert torch.equal(found[3] == torch.inf, found[2] == 0)
        if how["scales"]:
            changed, as_often = ((steps != grid.step).float().mean() for steps in (found[2], expected[2]))
            assert float(changed) == pytest.approx(float(as_often), abs=0.01)
            assert float(changed) > 0.05 or spec in (
                "mxfp4",
                "wna16(bits=8,group_size=256)",
            )  # few steps to choose from
            torch.testing.assert_close(found[2], expected[2], rtol=0.3, atol=0.0 if grid.zero is None else 1e-3)


RULES: dict[str, Snap] = {
    "float32": FloatSteps(2.0**-10),
    "bfloat16": FloatSteps(2.0**-10, 2.0**9, torch.bfloat16),
    "float16": FloatSteps(2.0**-24, 60000.0, torch.float16),
    "signed bfloat16": FloatSteps(2.0**-10, dtype=torch.bfloat16, with_sign=True),
    "powers": PowerSteps(),
    "e4m3": E4m3Steps(GlobalScale(divides=False, by_row=False), torch.tensor(0.037)),
    "e4m3, divided": E4m3Steps(GlobalScale(divides=True, by_row=False), torch.tensor(27.1)),
}


@pytest.mark.parametrize("name", [*RULES, "e4m3 by row", "e4m3 by row, divided"])
def test_steps_are_what_the_format_stores(name):
    """A unit of one code of 1 gets the step that eager's rule makes of its target, to the bit, where that is nearer."""
    n = 250
    generator = torch.Generator().manual_seed(0)
    target = torch.exp(torch.rand(1, n, generator=generator) * 24 - 12)  # beyond the largest that some can store
    if name == "signed bfloat16":
        target *= torch.where(torch.rand(1, n, generator=generator) < 0.5, -1.0, 1.0)
    rule = RULES.get(name) or E4m3Steps(
        GlobalScale(divides="divided" in name, by_row=True), torch.rand(n, generator=generator) + 0.01
    )
    step = target * 1.5
    wanted = rule(target, None)[0]
    nearer = (wanted - target).abs().double() < (step - target).abs().double()
    grid = Grid(target, step, IntegerLevels(-1, 1), 1, snap=rule)
    found = swept(grid, "cpu", torch.ones(1, 1), step, codes=False, scales=True, last=False)[2]
    assert int(nearer.sum()) > n / 2
    assert torch.equal(found, torch.where(nearer, wanted, step))


def test_zeros_are_stored_in_their_dtype():
    """A unit's zero is of the dtype that the format stores it in, where it changes."""
    grid, hessian = of_weight("awq_w4a16", 40, 256)
    rule = FloatSteps(2.0**-24, dtype=torch.float16, zero_dtype=torch.bfloat16)
    found = swept(replace(grid, snap=rule), "cpu", hessian, begin(grid), codes=True, scales=True, last=False)
    changed = found[4] != grid.zero
    assert int(changed.sum()) > 20
    assert torch.equal(found[4][changed], found[4][changed].bfloat16().float())
    assert torch.equal(found[2][changed], found[2][changed].half().float())


def test_threads_change_nothing():
    """One thread and four give the same bits."""
    grid, hessian = of_weight("nvfp4", 150, 128)
    root = torch.linalg.cholesky(hessian)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            values = rounded(grid, "cpu", torch.arange(128), root / root.diagonal())
            with use_backend("cpu"):
                own = replace(grid, step=grid.step.clone())
                gradient = torch.ones_like(values)
                descent_sweep(own, values, gradient, hessian, codes=True, scales=True, last=False)
            results.append((values, gradient, own.step))
    finally:
        torch.set_num_threads(before)
    for one, four in zip(*results, strict=True):
        assert torch.equal(one, four)


def ragged(grid: Grid, columns: int) -> Grid:
    """The same with units of so many columns, each with the first step of the old ones that it covers."""
    first = torch.arange(0, grid.target.shape[0], columns) // grid.columns
    zero = None if grid.zero is None else grid.zero[first]
    return replace(grid, step=grid.step[first], zero=zero, columns=columns)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("spec", ["nvfp4", "awq_w4a16", "svdquant_w4a4"])
def test_units_that_are_cut_short(spec, last):
    """The last unit may have fewer columns, the last block fewer units, and n no whole vectors."""
    grid, hessian = of_weight(spec, 37, 192)
    for columns in (48, 80, 130):
        cut = ragged(grid, columns)
        values = begin(cut)
        found, expected = (
            swept(cut, one, hessian, values, codes=True, scales=True, last=last) for one in ("cpu", "eager")
        )
        after, wanted = error(cut, hessian, found[0]), error(cut, hessian, expected[0])
        assert bool((after <= error(cut, hessian, values) * 1.0001).all())
        assert float(after.sum() / wanted.sum()) == pytest.approx(1, abs=5e-3)
        assert not torch.equal(found[2], cut.step)


def test_many_rows_go_by_blocks():
    """With the backend forced, rows too many for one call, and steps of a rule of their own, are still worked on."""
    grid, hessian = of_weight("nvfp4", 500, 640)
    few, root = grid.narrow(0, 40), torch.linalg.cholesky(hessian)
    order, lower = torch.arange(640), root / root.diagonal()
    whole, some = rounded(grid, "cpu", order, lower), rounded(few, "cpu", order, lower)
    assert (whole[:, :40] == some).float().mean() > 0.999
    how = {"codes": True, "scales": False, "last": False}
    many = swept(grid, "cpu", hessian, whole, **how)[0]
    assert (many[:, :40] == swept(few, "cpu", hessian, some, **how)[0]).float().mean() > 0.999

    def rule(step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the kernel cannot look into."""
        return few.snap(step, zero)

    own = replace(few, snap=rule)
    found = swept(own, "cpu", hessian, some, codes=True, scales=True, last=False)
    expected = swept(few, "cpu", hessian, some, codes=True, scales=True, last=False)
    assert (found[2] == expected[2]).float().mean() > 0.99


def test_nothing_to_do_changes_nothing():
    """Neither codes nor scales: values and gradients stay."""
    grid, hessian = of_weight("nvfp4", 16, 64)
    values = begin(grid)
    found = swept(grid, "cpu", hessian, values, codes=False, scales=False, last=False)
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], hessian @ (grid.target - values))


def test_what_they_do_not_take_is_refused():
    """Other roundings and orders are named, and eager takes them."""

    class Coarse(Grid):
        """A grid with a rounding of its own."""

    grid = exact_grid(E2M1, 4, 32, 4, zero=False)
    coarse, square = Coarse(grid.target, grid.step, grid.levels, 4), torch.eye(4)
    args = (coarse, torch.zeros(4, 32), torch.zeros(4, 32), square, True, True, False)
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="rounding of its own"):
        descent_sweep(*args[:4], codes=True, scales=True, last=False)
    assert select("descent_sweep", "*", "", "cpu", args).backend == "eager"
    for order in (torch.arange(8)[::2], torch.arange(4, dtype=torch.int32)):
        with use_backend("cpu"), pytest.raises(UnsupportedError, match="int64 without gaps"):
            gptq_sweep(grid, order, square, torch.zeros(4, 32))
