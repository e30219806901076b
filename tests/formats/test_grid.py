"""The grid of a format says exactly what its codes can express, and takes no step that cannot be stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, Parts, parse_spec
from lowbit.formats.grid import Grid
from tests.support import gaussian, outlier_weight
from tests.support.specs import ALL_SPECS, weight_shape

RAGGED = [  # shapes that the format's tiles do not divide, and single tiles
    ("int8(granularity=block,block_size=16x32)", (40, 72)),
    ("fp8_e4m3(granularity=block,block_size=32x16)", (50, 40)),
    ("fp8_e5m2(granularity=block,block_size=7x5)", (10, 12)),
    ("mxfp8", (5, 70)),
    ("mxfp8", (5, 20)),
    ("nvfp4", (6, 41)),
    ("nvfp4", (6, 16)),
    ("awq_w4a16(group_size=8)", (3, 8)),
    ("svdquant_w4a4(rank=2)", (4, 64)),
]
CASES = [(spec, weight_shape(parse_spec(spec))) for spec in ALL_SPECS] + RAGGED


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(-1).view(torch.uint8)


class Case:
    """A format, prepared rows of a weight with a row of zeros, and their parameters as stored."""

    def __init__(self, fmt: Format, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> None:
        self.fmt = fmt
        w = outlier_weight(*shape, dtype=dtype)
        w[2] = 0
        self.rows = fmt.prepared(w, 0, shape[0], "w")
        self.params: Parts = fmt.fit_stored(self.rows, fmt.fit_shared(w), dtype)
        self.size = float(self.rows.abs().max())

    @property
    def grid(self) -> Grid:
        """A new one."""
        return self.fmt.grid(self.rows, self.params)

    def decoded(self, rows: Tensor, params: Parts) -> Tensor:
        """What is read back after rows are stored."""
        qdata = self.fmt.pack(self.fmt.encode(rows, params))
        k = rows.shape[1]
        return self.fmt.decode(self.fmt.unpack(qdata, k), params)[:, :k]


@pytest.fixture(params=CASES, ids=[f"{spec}-{shape[0]}x{shape[1]}" for spec, shape in CASES])
def case(request) -> Case:
    """Each format, at a shape that it can hold."""
    spec, shape = request.param
    return Case(parse_spec(spec), shape)


def nearest(grid: Grid, x: Tensor) -> Tensor:
    """Every column of x [K, n] rounded."""
    return torch.stack([grid.nearest(x[k], k) for k in range(x.shape[0])])


def by_tile(grid: Grid, low: float, high: float, seed: int) -> Tensor:
    """Random numbers [U, n], the same for all rows that share a step."""
    units, n = grid.step.shape
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.rand((units, -(-n // grid.rows)), generator=generator) * (high - low) + low
    return tiles.repeat_interleave(grid.rows, dim=1)[:, :n]


def moved(grid: Grid, seed: int) -> tuple[Tensor, Tensor | None]:
    """Other steps and zeros, as stored."""
    zero = None if grid.zero is None else grid.zero * by_tile(grid, 0.5, 2.0, seed + 1)
    return grid.snap(grid.step * by_tile(grid, 0.5, 2.0, seed), zero)


def test_nearest_is_what_the_format_rounds_to(case):
    """Rounding each column to the grid gives what the format itself makes of the rows."""
    grid = case.grid
    values = case.fmt.from_grid(nearest(grid, grid.target), case.params)

    torch.testing.assert_close(values, case.fmt.project(case.rows, case.params), rtol=1e-6, atol=1e-6 * case.size)


def test_unchanged_steps_are_unchanged_parameters(case):
    """with_steps of a new grid gives the parameters it was made from, bit for bit."""
    again = case.fmt.with_steps(case.params, case.grid)

    assert again.keys() == case.params.keys()
    for name, part in case.params.items():
        assert again[name].dtype == part.dtype
        assert again[name].shape == part.shape
        assert torch.equal(bits(again[name]), bits(part)), name


@pytest.mark.parametrize("seed", [0, 1])
def test_values_of_the_grid_are_stored_as_they_are(case, seed):
    """Any values of the grid, far from the weight and under moved steps, are read back the same after storing."""
    grid = case.grid
    if seed:
        grid.replace_steps(slice(0, grid.step.shape[0]), *moved(grid, seed))
    params = case.fmt.with_steps(case.params, grid)
    noise = gaussian(*grid.target.shape, seed=seed) * 3 * grid.spread(grid.step, 0, grid.target.shape[0])
    wanted = case.fmt.from_grid(nearest(grid, grid.target + noise), params)

    torch.testing.assert_close(case.decoded(wanted, params), wanted, rtol=1e-6, atol=1e-6 * case.size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("spec", "shape"), CASES, ids=[f"{spec}-{shape[0]}x{shape[1]}" for spec, shape in CASES])
def test_snapped_steps_are_stored_exactly(spec, shape, dtype):
    """What snap gives it leaves alone, and the parameters hold it without rounding; no step becomes zero."""
    case = Case(parse_spec(spec), shape, dtype)
    grid = case.grid
    step, zero = moved(grid, 3)
    again, zero_again = grid.snap(step, zero)
    grid.replace_steps(slice(0, step.shape[0]), step, zero)
    stored = case.fmt.grid(case.rows, case.fmt.with_steps(case.params, grid))

    assert torch.equal(again, step)
    assert (step != 0).all()
    assert torch.equal(stored.step, step)
    if zero is not None:
        assert torch.equal(zero_again, zero)
        assert torch.equal(stored.zero, zero)


def test_steps_out_of_reach_are_brought_within(case):
    """Zero, tiny and negative steps become ones that can be stored, finite and not zero."""
    grid = case.grid
    for wanted in (0.0, 1e-30, -1e-30, -1.0):
        step, _ = grid.snap(torch.full_like(grid.step, wanted), grid.zero)
        assert step.isfinite().all()
        assert (step != 0).all()
        assert torch.equal(grid.snap(step, grid.zero)[0], step)


def test_zero_rows_stay_zero(case):
    """A row of zeros is rounded to zeros; whatever it is asked to hold, the result is finite."""
    grid = case.grid
    values = nearest(grid, grid.target)
    far = nearest(grid, torch.full_like(grid.target, 100 * case.size))

    assert (case.fmt.from_grid(values, case.params)[2].abs() <= 1e-6 * case.size).all()
    assert far.isfinite().all()


def test_levels_are_found_again(case):
    """levels_of gives for values of the grid the levels times which the steps give these values."""
    grid = case.grid
    k = grid.target.shape[0]
    values = nearest(grid, grid.target)
    levels = grid.levels_of(values, 0, k)
    zero = 0.0 if grid.zero is None else grid.spread(grid.zero, 0, k)

    torch.testing.assert_close(levels * grid.spread(grid.step, 0, k) + zero, values, rtol=1e-6, atol=1e-6 * case.size)
    last = k - k % grid.columns if k % grid.columns else k - grid.columns  # the last unit on its own
    assert torch.equal(grid.levels_of(values[last:], last, k), levels[last:])


def test_units_share_steps_as_the_format_states(case):
    """A grid has one step for each unit of the format, along K and along N."""
    grid, shape = case.grid, tuple(case.rows.shape)
    tall, wide = case.fmt.unit(shape)

    assert (grid.rows, grid.columns) == (tall, wide)
    assert grid.step.shape == (-(-shape[1] // wide), shape[0])
    for first in range(0, shape[0], tall):
        tile = grid.step[:, first : first + tall]
        assert torch.equal(tile, tile[:, :1].expand_as(tile))
