"""What the tests of calibration share."""

from __future__ import annotations

import pytest

from lowbit.dispatch import use_backend


@pytest.fixture
def exact_sums():
    """Second moments as precise as float32, for tests that compare them with what they should be sums of.

    Some processors sum products of int16 (tests/backends/cpu/test_add_second_moment.py).
    """
    with use_backend("eager"):
        yield
