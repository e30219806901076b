"""The scale search: never worse than rounding in any unit, as good as it can be, and driven by statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, strategies as st

from lowbit.errors import SolverError
from lowbit.formats import Candidate, Format, parse_spec
from lowbit.formats.fp8 import Fp8E4M3
from lowbit.solvers import Statistics, solver
from tests.support import gaussian, outlier_weight, sqnr
from tests.support.specs import SMALL_SPECS

SPECS = [
    *SMALL_SPECS,
    "fp8_e4m3(granularity=row)",
    "fp8_e5m2(granularity=block,block_size=32x48)",
    "int8(granularity=tensor)",
    "int8(granularity=block,block_size=32x48)",
    "int8(rotation=16)",
    "awq_w4a16(group_size=16)",
]
SEARCHED = [spec for spec in SPECS if not spec.startswith("svdquant")]


def unit_errors(fmt: Format, w: torch.Tensor, parts: dict, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The squared error of each unit in float64."""
    n, k = w.shape
    squared = (fmt.dequantize(parts, (n, k), torch.float32).double() - w.double()).square()
    if weights is not None:
        squared = squared * weights.double()
    return fmt.unit_errors(squared)


@given(
    spec=st.sampled_from(SEARCHED),
    rows=st.integers(1, 70),
    columns=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 3),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_unit_is_worse_than_rounding(spec, rows, columns, seed, spread, weighted, dtype):
    """For any weight, in no unit does the search have a larger squared error, weighted or not, than plain rounding.

    The room of one in a million is that of sums in float32 against this test's float64.
    """
    fmt, k = parse_spec(spec), 64 * columns
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn((rows, k), generator=generator) * torch.exp(spread * torch.randn((rows, k), generator=generator))
    w = w.clamp(-1e4, 1e4).to(dtype)
    weights = torch.rand(k, generator=generator).square() if weighted else None
    statistics = Statistics(hessian=weights) if weighted else None
    rounded, searched = solver("rtn")(w, fmt), solver("scale_search")(w, fmt, statistics)

    before, after = unit_errors(fmt, w, rounded, weights), unit_errors(fmt, w, searched, weights)
    assert bool((after <= before * (1 + 1e-6)).all())


@given(rows=st.integers(16, 40), seed=st.integers(0, 2**31), unsigned=st.booleans())
def test_svdquant_is_not_worse_than_rounding(rows, seed, unsigned):
    """The residual of svdquant, which has the same smoothing and low rank for both solvers, obeys the same rule."""
    fmt = parse_spec(f"svdquant_w4a4(rank=4,act_unsigned={unsigned})")
    w = outlier_weight(rows, 128, seed=seed)
    before = unit_errors(fmt, w, solver("rtn")(w, fmt))
    after = unit_errors(fmt, w, solver("scale_search")(w, fmt))

    assert bool((after <= before * (1 + 1e-6)).all())


# state-of-the-art.md, table 1.2, column "best scale search", within 0.1 dB below; the Gaussian has 1024 x 1024 values.
LADDER = {
    "fp8_e4m3": 31.5,
    "fp8_e4m3(granularity=row)": 31.6,
    "fp8_e4m3(granularity=block,block_size=1x128)": 31.8,
    "mxfp4": 19.04,
    "mxfp8": 31.5,
    "int8": 42.15,
    "int8(granularity=tensor)": 38.9,
    "int8(granularity=block,block_size=1x128)": 44.0,
    "int8(granularity=block,block_size=1x32)": 45.6,
    "nvfp4": 21.8,
    "awq_w4a16": 21.4,
    "awq_w4a16(group_size=128)": 20.5,
    "svdquant_w4a4": 20.9,
}


@pytest.mark.parametrize(("spec", "known"), LADDER.items())
def test_reaches_the_known_ratio(spec, known):
    """On a Gaussian of 1024 x 1024 the search comes within 0.1 dB of the best known for the format, or above."""
    fmt, w = parse_spec(spec), gaussian(1024, 1024)
    parts = solver("scale_search")(w, fmt)

    assert sqnr(w, fmt.dequantize(parts, (1024, 1024), torch.float32)) >= known - 0.1


@pytest.mark.parametrize("spec", ["nvfp4", "awq_w4a16", "int8", "int8(granularity=tensor)", "int8(rotation=64)"])
def test_statistics_move_the_error_away_from_columns_that_matter(spec):
    """With second moments the weighted error becomes smaller than that of a search without them."""
    fmt, w = parse_spec(spec), outlier_weight(64, 256, seed=3)
    weights = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 8
    blind = unit_errors(fmt, w, solver("scale_search")(w, fmt), weights).sum()
    seeing = unit_errors(fmt, w, solver("scale_search")(w, fmt, Statistics(hessian=torch.diag(weights))), weights).sum()

    assert seeing < blind


@dataclass(frozen=True)
class _Counting(Fp8E4M3):
    """fp8 by rows with one candidate whose bound says that it is hopeless; counts how often a candidate is tried."""

    name: ClassVar[str] = "counting"
    tried: ClassVar[list[float]] = []
    bound: ClassVar[float] = float("inf")

    def candidates(self, rows: torch.Tensor, params: dict) -> Iterator[Candidate]:
        yield Candidate({"scale": params["scale"] * 7}, torch.full_like(params["scale"], self.bound))

    def project(self, rows: torch.Tensor, params: dict) -> torch.Tensor:
        self.tried.append(float(params["scale"][0, 0]))
        return super().project(rows, params)


@pytest.mark.parametrize(("bound", "tries"), [(float("inf"), 1), (0.0, 2)])
def test_a_bound_that_no_unit_can_beat_skips_the_candidate(monkeypatch, bound, tries):
    """A candidate is only tried when its bound is below the best error of some unit."""
    monkeypatch.setattr(_Counting, "bound", bound)
    monkeypatch.setattr(_Counting, "tried", [])
    solver("scale_search")(gaussian(4, 64), _Counting(granularity="row"))

    assert len(_Counting.tried) == tries


@dataclass(frozen=True)
class _Careless(Fp8E4M3):
    """Says that two halves of a row are units, while they share one scale."""

    name: ClassVar[str] = "careless"

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, shape[1] // 2


def test_a_candidate_that_changes_what_units_share_is_refused():
    """A parameter that has no value for each unit cannot be chosen by unit: an error, not a silent mix."""
    with pytest.raises(SolverError, match=r"scale of shape \[4, 1\] has no value for each of \[4, 2\] units"):
        solver("scale_search")(gaussian(4, 64), _Careless(granularity="row"))
