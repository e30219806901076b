"""Layers that differ only in the number of their block are one group."""

from __future__ import annotations

import pytest

from lowbit.checkpoint.layer_groups import fold, grouped


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("blocks.3.attn.q", "blocks.*.attn.q"),
        ("0.attn.q", "*.attn.q"),
        ("a.1.b.22.c", "a.*.b.*.c"),
        ("img_mlp.2", "img_mlp.2"),
        ("layer3.weight", "layer3.weight"),
    ],
)
def test_only_numbers_that_a_dot_follows_are_folded(name, folded):
    """A block's number is; one at the end, or inside a word, tells layers apart."""
    assert fold(name) == folded


def test_groups_are_told_apart_by_kind_and_stand_in_order():
    """Two kinds under one name are two groups, and a group of one keeps its own name."""
    items = [("b.0.q", 1), ("b.1.q", 2), ("b.2.q", 1), ("x", 1)]

    groups = grouped(items, lambda item: item[0], lambda item: item[1])

    assert [(name, len(found)) for name, found in groups] == [("b.*.q", 2), ("b.1.q", 1), ("x", 1)]
