"""Levels round as the formats' own codes do: to the nearest value, ties to even, clamped at the largest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.floats import round_to_e2m1
from lowbit.numerics.levels import E2M1, E4M3, E5M2, IntegerLevels


def fp8_values(dtype: torch.dtype) -> Tensor:
    """All finite values of a float8 dtype, sorted."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()].unique()


E2M1_VALUES = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
CASES = {
    "e4m3": (
        E4M3, fp8_values(torch.float8_e4m3fn), lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    ),
    "e5m2": (
        E5M2, fp8_values(torch.float8_e5m2), lambda x: x.clamp(-57344, 57344).to(torch.float8_e5m2).float()
    ),
    "e2m1": (E2M1, E2M1_VALUES, round_to_e2m1),
    "int8": (IntegerLevels(-127, 127), torch.arange(-127.0, 128.0), lambda x: by_python(x, -127, 127)),
    "int4": (IntegerLevels(-8, 7), torch.arange(-8.0, 8.0), lambda x: by_python(x, -8, 7)),
}  # fmt: skip


def by_python(x: Tensor, low: int, high: int) -> Tensor:
    """Python's own rounding, half to even, of every value."""
    return torch.tensor([float(min(max(round(v), low), high)) for v in x.double().tolist()])


@pytest.fixture(params=CASES)
def case(request):
    """Levels, all their values, and a second way to round to them."""
    return CASES[request.param]


def test_every_value_stays(case):
    """Each level is rounded to itself, bit for bit but for the sign of zero."""
    levels, values, _ = case

    assert torch.equal(levels.round_(values.clone()), values)


def test_midpoints_go_to_the_even_neighbour(case):
    """Halfway between two levels, and one float32 step to either side of that, the result is the reference's."""
    levels, values, reference = case
    middle = (values[1:] + values[:-1]) / 2
    around = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-torch.inf, torch.inf)]
    below, above = (levels.round_(x.clone()) for x in around)

    assert torch.equal(levels.round_(middle.clone()), reference(middle))
    assert torch.equal(below, values[:-1])
    assert torch.equal(above, values[1:])


def test_what_is_out_of_reach_is_clamped(case):
    """Values beyond the largest and the smallest level become these, however large; tiny ones become zero."""
    levels, values, _ = case
    far = torch.tensor([1.0001, 1.5, 2.0, 1e10, 3e38 / float(values[-1])])

    assert (levels.round_(far * values[-1]) == values[-1]).all()
    assert (levels.round_(far * values[0]) == values[0]).all()
    tiny = torch.tensor([1e-30, -1e-30, 1e-45, -1e-45, 0.0, -0.0])
    assert (levels.round_(tiny) == 0).all()


def test_any_value_is_rounded_as_by_the_reference(case):
    """Over all magnitudes, both signs, the two ways to round agree."""
    levels, values, reference = case
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(20_000, generator=generator) * 40 - 25)
    x = torch.cat([size, -size, torch.randn(5_000, generator=generator) * values[-1] / 2])

    assert torch.equal(levels.round_(x.clone()), reference(x))


def test_rounding_writes_over_its_argument_and_takes_strides(case):
    """The result is the argument, also for a strided column of a matrix, whose other columns stay."""
    levels, values, reference = case
    matrix = torch.linspace(float(values[0]) * 1.1, float(values[-1]) * 1.1, 96).view(32, 3)
    before = matrix.clone()
    column = matrix[:, 1]

    assert levels.round_(column) is column
    assert torch.equal(column, reference(before[:, 1]))
    assert torch.equal(matrix[:, ::2], before[:, ::2])
