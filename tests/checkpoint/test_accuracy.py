"""The measures of error that are added up piece by piece."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lowbit.checkpoint.accuracy import Accuracy, AccuracyMeter
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
