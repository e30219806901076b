"""Samples with some of their tokens replaced."""

from __future__ import annotations

import random

import pytest

from lowbit.integrations.varied_tokens import varied, word_tokens


class Tokenizer:
    """As much of a tokenizer as is asked for."""

    all_special_ids = (0, 7)

    def get_vocab(self):
        """Pieces as several tokenizers write them."""
        words = ["pad", "##ing", "Ġword", "▁und", "12", "[unused3]", "<0x0A>", "end", "größe", "."]
        return {word: index for index, word in enumerate(words)}


def test_words_and_pieces_of_words_are_taken():
    """Whatever marks a tokenizer uses, letters count; special tokens, digits, bytes and signs do not."""
    assert word_tokens(Tokenizer()) == [1, 2, 3, 8]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_inner_tokens_is_replaced(share):
    """The ends and the length of each sample stay, and about the share of what is between changes."""
    source = random.Random(0)
    rows = [[1, *(source.randrange(10, 20) for _ in range(source.randrange(0, 60))), 2] for _ in range(200)]

    found = varied(rows, range(100, 200), share)

    assert [len(row) for row in found] == [len(row) for row in rows]
    assert all(new[0] == 1 and new[-1] == 2 for new in found)
    inner = [(old, new) for a, b in zip(rows, found, strict=True) for old, new in zip(a[1:-1], b[1:-1], strict=True)]
    changed = [new for old, new in inner if new != old]
    assert len(changed) == pytest.approx(share * len(inner), abs=0.03 * len(inner))
    assert all(100 <= new < 200 for new in changed)


def test_the_same_every_time():
    """A run that goes on after it was killed must meet the same batches; another seed makes others."""
    rows = [[1, *range(10, 60), 2]] * 3

    assert varied(rows, range(100, 999), 0.5) == varied(rows, range(100, 999), 0.5)
    assert varied(rows, range(100, 999), 0.5) != varied(rows, range(100, 999), 0.5, seed=1)
    assert rows == [[1, *range(10, 60), 2]] * 3


def test_without_words_nothing_changes():
    """A tokenizer without any words, and samples without any tokens, are left as they are."""
    assert varied([[1, 5, 2], [], [4]], [], 1.0) == [[1, 5, 2], [], [4]]
    assert varied([[], [4]], [9], 1.0) == [[], [4]]
