"""Measures of how close embeddings stay."""

from __future__ import annotations

import pytest
import torch

from lowbit.report import compare_embeddings


def test_equal_embeddings_agree_exactly():
    """Cosines are 1 and every nearest neighbour is kept, whatever the lengths of the vectors."""
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))

    found = compare_embeddings(rows, 3 * rows)

    assert found.mean == pytest.approx(1.0, abs=1e-12)
    assert found.worst == pytest.approx(1.0, abs=1e-12)
    assert found.same_nearest == 1.0


def test_the_worst_row_is_found():
    """A single row that turned by 60 degrees gives the worst cosine, 0.5, and its place."""
    rows = torch.eye(4)
    turned = rows.clone()
    turned[2] = torch.tensor([0.0, 0.0, 0.5, 0.75**0.5])

    found = compare_embeddings(rows, turned)

    assert found.worst == pytest.approx(0.5, abs=1e-6)
    assert found.worst_row == 2
    assert found.mean == pytest.approx(0.875, abs=1e-6)


def test_a_changed_neighbour_is_counted():
    """Two of three points on a line change their nearest one when the middle one moves to the other side."""
    before = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 1.0]])
    after = torch.tensor([[1.0, 0.0], [1.0, 0.9], [1.0, 1.0]])

    assert compare_embeddings(before, after).same_nearest == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(3, 2), torch.ones(2, 2)),
        (torch.ones(1, 2), torch.ones(1, 2)),
        (torch.ones(2, 2), torch.full((2, 2), float("nan"))),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b):
    """Other shapes, a single row and NaN are errors, never a number."""
    with pytest.raises(ValueError, match=r"expected|NaN"):
        compare_embeddings(a, b)
