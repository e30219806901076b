"""Smoothing factors without data: the walk among candidates, and the largest magnitudes they are made of."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.numerics.smoothing import bottom, column_amax
from tests.support import gaussian

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("errors", "start", "found"),
    [
        ([5, 4, 3, 2, 1], 1, 4),
        ([1, 2, 3, 4, 5], 4, 0),
        ([3, 1, 2, 0, 9], 0, 1),
        ([2, 2, 2, 2], 2, 0),
        ([3, 2, 2, 1], 1, 1),
        ([7], 0, 0),
        ([1, NAN, 3], 1, 0),
        ([NAN, NAN, 3], 1, 2),
        ([4, 1, NAN, 0], 0, 1),
        ([INF, INF, 2, 3], 1, 2),
        ([NAN, NAN, NAN], 2, 0),
        ([INF, NAN, INF], 1, 0),
    ],
)
def test_the_walk_ends_where_no_neighbour_is_better(errors, start, found):
    """Down the valley, past ties to the first, and away from NaN and infinity; each error is asked for once."""
    asked = []

    def error(index: int) -> float:
        asked.append(index)
        return errors[index]

    assert bottom(error, len(errors), start) == found
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_largest_magnitudes(dtype):
    """Of all pieces, empty ones and rows with gaps among them; NaN and infinity reach their column only."""
    w = gaussian(33, 96).to(dtype)
    w[:, 3] = 0
    w[5, 7], w[6, 9] = -INF, NAN
    w[7, 9] = INF
    for source in (w, w.t().contiguous().t(), torch.cat([w, w], 1)[:, :96]):
        found = column_amax((source[a:b] for a, b in ((0, 10), (10, 10), (10, 33))), 96, w.device)
        torch.testing.assert_close(found, w.float().abs().amax(0), rtol=0, atol=0, equal_nan=True)
