"""Where things stand on a picture."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lowbit.report.axes import MAX_NINES, Axis, nines, nines_label, spread


@pytest.mark.parametrize("values", [[3.0], [0.0], [21.6, 21.7], [-5.0, 47.0], [1e-9, 2e-9], [1234.0, 98765.0], []])
def test_an_axis_holds_its_values_and_has_round_ticks(values):
    """All values lie between its ends, which are ticks, and there are a handful of ticks."""
    axis = Axis.around(values)

    assert axis.low < axis.high
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)
    assert 2 <= len(axis.ticks) <= 8
    assert all(axis.low - 1e-12 <= value <= axis.high + 1e-12 for value in values)


def test_percent_runs_from_end_to_end_and_never_beyond():
    """The ends are 0 and 100, and infinities stand at the ends."""
    axis = Axis(20.0, 40.0, (20.0, 40.0))

    assert [axis.percent(value) for value in (20.0, 30.0, 40.0)] == [0.0, 50.0, 100.0]
    assert [axis.percent(value) for value in (-math.inf, 0.0, 99.0, math.inf)] == [0.0, 0.0, 100.0, 100.0]


def test_nines_count_how_near_a_cosine_is_to_one():
    """0.99 has two, 0.999 three, and 1 no more than can be told apart."""
    assert nines(0.99) == pytest.approx(2.0)
    assert nines(0.999) == pytest.approx(3.0)
    assert nines(1.0) == MAX_NINES
    assert [nines_label(value) for value in (0.0, 1.0, 2.0, 3.0)] == ["0", "0.9", "0.99", "0.999"]


def test_spread_keeps_order_distance_and_bounds():
    """Names that would overlap move apart, no farther than the picture, in the order of what they name."""
    wanted = [50.0, 52.0, 51.0, 99.0]

    places = spread(wanted, 10.0, 0.0, 100.0)

    inorder = sorted(places)
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(inorder))
    assert [wanted[places.index(place)] for place in inorder] == sorted(wanted)
    assert inorder[0] >= 0
    assert inorder[-1] <= 100
    assert spread([], 10.0, 0.0, 100.0) == []
