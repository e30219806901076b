"""add_column_ranges on the CPU, by the compiled kernel of each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import explain, use_backend
from lowbit.ops.column_ranges import BINS, add_column_ranges
from tests.support import gaussian

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

SIZES = [(1, 1), (2, 3), (63, 15), (64, 16), (65, 17), (130, 64), (300, 65), (1024, 100), (77, 200)]


def taken(x: Tensor, backend: str, step: int = 1, times: int = 1) -> list[Tensor]:
    """Sums, ranges and counts of rows, taken in `times` times."""
    k = x.shape[1]
    made = [torch.zeros(k, dtype=torch.float64), torch.full((k,), torch.inf), torch.full((k,), -torch.inf)]
    made.append(torch.zeros(BINS, dtype=torch.int64))
    with use_backend(backend):
        for _ in range(times):
            add_column_ranges(x, *made, step)
    return made


@pytest.mark.parametrize("step", [1, 3, 5000])
@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_all_is_that_of_the_reference(rows, k, step):
    """Ranges and counts to the bit, sums within float32's precision of their terms; twice is twice."""
    x = gaussian(rows, k) * torch.logspace(-8, 6, k) + 0.25
    (total, *others), wanted = taken(x, "cpu", step, 2), taken(x, "eager", step, 2)
    assert all(torch.equal(one, other) for one, other in zip(others, wanted[1:], strict=True))
    exact, size = 2 * x.double().sum(0), x.double().abs().sum(0)
    assert float(((total - exact).abs() / size).max()) < 1e-6


@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_bfloat16_is_as_if_it_were_float32(rows, k):
    """To the bit, rows with a step between them too."""
    x = (gaussian(rows, k) * torch.logspace(-8, 6, k)).bfloat16()
    found, wanted = taken(x, "cpu", 2), taken(x.float(), "cpu", 2)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    eager = taken(x, "eager", 2)
    assert all(torch.equal(one, other) for one, other in zip(found[1:], eager[1:], strict=True))


def test_extremes_are_counted_and_kept():
    """Zeros of both signs, the smallest and the largest numbers; every one of them is in some bin."""
    smallest, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    x = torch.tensor([[0.0, -0.0, 1e-45, -smallest, largest, -largest, 1.0, -1.0]]).repeat(3, 5)
    found, wanted = taken(x, "cpu"), taken(x, "eager")
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert int(found[3].sum()) == x.numel()


def test_nothing_depends_on_threads():
    """To the bit."""
    x, before, made = gaussian(700, 333) * 1e3, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(taken(x, "cpu", 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for more in made[1:] for one, other in zip(made[0], more, strict=True))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({0: torch.zeros(2, 8, dtype=torch.float64)}, "x is float64"),
        ({0: torch.zeros(2, 8, dtype=torch.float16)}, "x is float16"),
        ({0: torch.zeros(8, 2).t()}, "without gaps"),
        ({0: torch.zeros(0, 8)}, "at least one row"),
        ({0: torch.zeros(8)}, "at least one row"),
        ({1: torch.zeros(8)}, "total is float32"),
        ({2: torch.zeros(7)}, "minimum is float32 [7]"),
        ({3: torch.zeros(8, device="meta")}, "on meta"),
        ({4: torch.zeros(BINS)}, "magnitudes is float32"),
        ({4: torch.zeros(BINS - 1, dtype=torch.int64)}, "[4095]"),
        ({5: 0}, "every 0th"),
    ],
)
def test_refusals(change, why):
    """What the kernel cannot take is left to PyTorch, in words."""
    args = [torch.zeros(2, 8), torch.zeros(8, dtype=torch.float64), torch.zeros(8), torch.zeros(8)]
    args += [torch.zeros(BINS, dtype=torch.int64), 1]
    for at, value in change.items():
        args[at] = value
    assert why in explain("add_column_ranges", "*", "", "cpu", tuple(args))["cpu:add_column_ranges"]
