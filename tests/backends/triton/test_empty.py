"""Products of which an axis is empty, in every format."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lowbit import dispatch
from lowbit.dispatch import Kernel
from lowbit.errors import LowbitError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.layouts.base import get_layout
from tests.support.kernel_examples import specs, title
from tests.support.triton_linear import DEVICE, require
from tests.support.triton_rows import random_parts

require()

ROWS, COLUMNS = 256, 1024  # that every format takes
DTYPE = torch.float16


def linears(backend: str) -> list[Kernel]:
    """The kernels of `linear` of a backend."""
    dispatch.load(backend)
    return [one for one in dispatch.table() if (one.op, one.backend) == ("linear", backend)]


@dataclass(frozen=True)
class Case:
    """A Triton linear, and a weight that it is given: plain, and as the kernel reads it."""

    entry: Kernel
    fmt: Format
    plain: Parts
    parts: Parts

    def refuses(self, x: torch.Tensor) -> str | None:
        """What the kernel says."""
        return self.entry.refuses(self.fmt, x, self.parts, None)

    def __str__(self) -> str:
        return f"{title(self.entry)}, {self.fmt}"


def cases(n: int, k: int) -> list[Case]:
    """Each Triton linear with each spec of which there is a weight [n, k] in the layout that it reads."""
    found = {}
    for entry in linears("triton"):
        layout = "" if entry.layout == dispatch.ANY_LAYOUT else entry.layout
        for fmt in (parse_spec(spec).plain for spec in specs(entry.format)):
            if fmt.check_shape(n, k) is not None:
                continue
            try:
                plain = random_parts(fmt, n, k)
                parts = get_layout(layout, fmt).pack(fmt, plain) if layout else plain
            except (LowbitError, RuntimeError):  # the layout takes no such weight
                continue
            case = Case(entry, fmt, plain, {name: part.to(DEVICE) for name, part in parts.items()})
            found[str(case)] = case
    return list(found.values())


WITHOUT_ROWS, WITHOUT_COLUMNS, WHOLE = cases(0, COLUMNS), cases(ROWS, 0), cases(ROWS, COLUMNS)
EAGER = next(one for one in linears("eager") if not one.layout)


def x_of(*shape: int) -> torch.Tensor:
    """Activations."""
    return torch.ones(shape, dtype=DTYPE, device=DEVICE)


@pytest.mark.parametrize("made", [WITHOUT_ROWS, WITHOUT_COLUMNS, WHOLE], ids=["N = 0", "K = 0", "M = 0"])
def test_every_format_is_a_case(made):
    """No format is left out below, but for one whose rank is larger than an empty axis."""
    missing = {entry.format for entry in linears("triton")} - {case.entry.format for case in made}
    assert missing <= (set() if made is WHOLE else {"svdquant_w4a4"})


@pytest.mark.parametrize("case", WITHOUT_COLUMNS, ids=str)
def test_no_columns(case):
    """Of a weight without columns every kernel says so, and the product is the bias, or zeros: eager gives it."""
    bias = torch.linspace(-2, 2, ROWS, dtype=DTYPE)
    for shape in ((0, 0), (3, 0), (2, 3, 0)):
        x = x_of(*shape)
        assert case.refuses(x) == "no columns; there is nothing to multiply"
        wanted = torch.zeros((*shape[:-1], ROWS), dtype=DTYPE)
        assert torch.equal(EAGER.run(case.fmt, x.cpu(), case.plain, None), wanted)
        assert torch.equal(EAGER.run(case.fmt, x.cpu(), case.plain, bias), wanted + bias)


@pytest.mark.parametrize("case", [case for case in WHOLE if case.refuses(x_of(1, COLUMNS)) is None], ids=str)
def test_no_tokens(case):
    """Of no tokens the result has no rows, whatever the leading axes, with a bias and without."""
    for bias in (None, x_of(ROWS)):
        for shape in ((0,), (2, 0)):
            found = case.entry.run(case.fmt, x_of(*shape, COLUMNS), case.parts, bias)
            assert (found.shape, found.dtype) == ((*shape, ROWS), DTYPE)


@pytest.mark.parametrize("case", [case for case in WITHOUT_ROWS if case.refuses(x_of(1, COLUMNS)) is None], ids=str)
def test_no_rows(case):
    """Of a weight without rows the result has no columns."""
    for shape in ((1,), (2, 3)):
        found = case.entry.run(case.fmt, x_of(*shape, COLUMNS), case.parts, x_of(0))
        assert (found.shape, found.dtype) == ((*shape, 0), DTYPE)
