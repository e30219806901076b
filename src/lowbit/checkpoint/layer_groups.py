"""Layers that differ only in the number of their block, told as one group.

>>> fold("blocks.3.attn.q"), fold("double_blocks.0.img_mlp.2")
('blocks.*.attn.q', 'double_blocks.*.img_mlp.2')
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
_BLOCK = re.compile(r"(?<![^.])\d+(?=\.)")


def fold(name: str) -> str:
    """The name with `*` for every number that a dot follows; a number at the end tells layers of one block apart."""
    return _BLOCK.sub("*", name)


def grouped(items: Iterable[T], name: Callable[[T], str], kind: Callable[[T], object]) -> list[tuple[str, list[T]]]:
    """Items by folded name and kind, in the order of the first of each; a group of one keeps its own name."""
    groups: dict[tuple[str, object], list[T]] = {}
    for item in items:
        groups.setdefault((fold(name(item)), kind(item)), []).append(item)
    return [(pattern if len(found) > 1 else name(found[0]), found) for (pattern, _), found in groups.items()]
