"""The measures of error that are added up piece by piece."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lowbit.checkpoint.accuracy import Accuracy, AccuracyMeter
from lowbit.formats import parse_spec
from lowbit.ops.encode import row_errors
from tests.support import gaussian, sqnr


def measured(rows: torch.Tensor, approx: torch.Tensor, pieces: int = 1) -> Accuracy:
    """The accuracy of a whole weight, added in some pieces."""
    meter = AccuracyMeter()
    for a, b in zip(rows.chunk(pieces), approx.clone().chunk(pieces), strict=True):
        meter.add(a, b)
    return meter.result()


@pytest.mark.parametrize("pieces", [1, 3])
def test_measures_are_right_in_any_pieces(pieces):
    """SQNR, cosine and the worst row's relative error agree with float64 over the whole weight."""
    w = gaussian(90, 70)
    a = w + 0.01 * gaussian(90, 70, seed=1)
    a[41] *= 1.5
    result = measured(w, a, pieces)
    r, x = w.double(), a.double()

    assert result.sqnr == pytest.approx(sqnr(w, a), abs=1e-3)
    assert result.cosine == pytest.approx(float((r * x).sum() / (r.norm() * x.norm())), abs=1e-6)
    assert result.max_row_error == pytest.approx(float((r - x)[41].norm() / r[41].norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "approx", "expected"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], (math.inf, 1.0, 0.0)),
        ([[0.0, 0.0]], [[0.0, 0.0]], (math.inf, 1.0, 0.0)),
        ([[0.0, 0.0]], [[3.0, 4.0]], (-math.inf, 0.0, math.inf)),
        ([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], (math.inf, 1.0, 0.0)),
        ([[3.0, 4.0]], [[0.0, 0.0]], (0.0, 0.0, 1.0)),
        ([[3.0, 4.0]], [[-3.0, -4.0]], (10 * math.log10(0.25), -1.0, 2.0)),
    ],
)
def test_edges(rows, approx, expected):
    """Zeros, perfect copies and noise out of nothing have the values that their definitions give."""
    result = measured(torch.tensor(rows), torch.tensor(approx))

    assert (result.sqnr, result.cosine, result.max_row_error) == pytest.approx(expected)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-21, 1e21, 1e30])
def test_squares_that_float32_cannot_hold_are_counted(size):
    """Weights so small or large that their squares are 0 or infinite in float32 are measured as all others are."""
    w = gaussian(9, 70) * size
    a = w + 0.01 * w.roll(1, dims=1)
    w[5] = a[5] = 0
    result = measured(w, a)

    assert result.sqnr == pytest.approx(sqnr(w.double(), a.double()), abs=1e-3)
    assert result.max_row_error == pytest.approx(
        float(((w - a).double().norm(dim=1) / w.double().norm(dim=1)).nan_to_num(0).max()), rel=1e-3
    )


@pytest.mark.parametrize("spec", ["fp8_e4m3", "int8(granularity=block)", "mxfp8", "nvfp4", "svdquant_w4a4", "wna16"])
@pytest.mark.parametrize("size", [1e-40, 1e30])
def test_what_became_of_a_tiny_or_huge_weight(spec, size):
    """A layer of which nothing is left is not called perfect, nor one that came out well a ruin."""
    w, fmt = gaussian(130, 256) * size, parse_spec(spec)
    parts = fmt.quantize(w)
    meter = AccuracyMeter()
    meter.add_sums(row_errors(fmt, parts, w))
    left = fmt.dequantize(parts, w.shape, torch.float32)

    assert meter.result().sqnr == pytest.approx(sqnr(w.double(), left.double()), abs=0.01)


def test_nan_is_not_hidden():
    """A NaN in what was decoded makes every measure NaN; no maximum or clamp swallows it."""
    a = gaussian(4, 4)
    a[2, 2] = math.nan

    assert all(math.isnan(value) for value in vars(measured(gaussian(4, 4), a)).values())


def test_json_round_trip_is_strict():
    """Finite and infinite values come back from strict JSON."""
    for accuracy in (Accuracy(31.5, 0.5, 0.25), Accuracy(math.inf, 1.0, 0.0), Accuracy(-math.inf, 0.0, math.inf)):
        text = json.dumps(accuracy.to_json(), allow_nan=False)
        assert Accuracy.from_json(json.loads(text)) == accuracy
