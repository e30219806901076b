"""What a model family is, how its checkpoints are recognized, and what it says about a layer.

Every `*.json` here but base.json is one family:

    name, title, aliases   its name on the command line, its name for people, other names
    detect                 "all": patterns of which each must match some key, "none": patterns that must match none;
                           a family without "all" is never detected and has to be asked for by name
    prefixes               what may stand before every key of the model, the longest first; no prefix is always tried
    keep, drop             rules {pattern, why}: layers that stay as they are, layers that the model can do without
    embedding              patterns of weights whose rows are looked up, not multiplied
    bank_transposed        patterns of banks of experts that are [E, K, N]; others are [E, N, K]
    after_gelu             patterns of layers that read what a GELU gave and nothing else, which is never below -0.1701
    keep_first_blocks      {pattern, count}: the first blocks stay as they are; group 1 is the block's number
    keep_last_blocks       the same for the last ones, at any depth

Patterns are regular expressions searched for in the name without the prefix. They are anchored at the name's start or
end or at its dots, so that "last" never means "class". The rules of base.json follow those of every family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

_DEEP = re.compile(r"\.(?:[3-9]|[1-9]\d+)\.")


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer, and the reason as a sentence."""

    action: Literal["quantize", "keep", "drop"]
    why: str


@dataclass(frozen=True)
class Rule:
    """A pattern of layer names and the reason for the decision about them."""

    pattern: str
    why: str


@dataclass(frozen=True)
class EdgeBlocks:
    """The first or the last `count` blocks; group 1 of the pattern is a block's number."""

    pattern: str
    count: int


@dataclass(frozen=True)
class Preset:
    """One model family; the module's docstring describes the fields."""

    name: str
    title: str
    aliases: tuple[str, ...]
    detect_all: tuple[str, ...]
    detect_none: tuple[str, ...]
    prefixes: tuple[str, ...]
    keep: tuple[Rule, ...]
    drop: tuple[Rule, ...]
    embedding: tuple[str, ...]
    keep_first_blocks: EdgeBlocks | None
    keep_last_blocks: EdgeBlocks | None
    bank_transposed: tuple[str, ...] = ()
    after_gelu: tuple[str, ...] = ()

    def find_prefix(self, keys: Iterable[str]) -> str | None:
        """The prefix under which these keys are a model of this family, or None where they are not."""
        sample = sample_keys(keys)
        for prefix in ("", *self.prefixes) if self.detect_all else ():
            names = [key[len(prefix) :] for key in sample if key.startswith(prefix)]
            if all(_matches(p, names) for p in self.detect_all) and not any(
                _matches(p, names) for p in self.detect_none
            ):
                return prefix
        return None

    def bind(self, keys: Iterable[str], *, allow_drop: bool = False) -> BoundPreset:
        """Fit the family to a checkpoint: find the prefix and the depth of its keys.

        `allow_drop`: let `decide` answer "drop". Only whoever uses a model for one purpose knows that a part of it is
        not needed, so without this the rules for dropping are no more than a remark in the reason.
        """
        keys = tuple(keys)
        prefix = self.find_prefix(keys)
        if prefix is None:  # asked for by name: the declared prefix that most keys have
            counts = {p: sum(key.startswith(p) for key in keys) for p in self.prefixes}
            prefix = max(counts, key=lambda p: counts[p], default="")
            prefix = prefix if counts.get(prefix) else ""
        return BoundPreset(self, prefix, [key[len(prefix) :] for key in keys if key.startswith(prefix)], allow_drop)


class BoundPreset:
    """A family fitted to one checkpoint: `prefix` stands before every key of the model in it."""

    def __init__(self, preset: Preset, prefix: str, names: Sequence[str], allow_drop: bool) -> None:
        self.preset = preset
        self.prefix = prefix
        self._allow_drop = allow_drop
        self._edges: list[tuple[re.Pattern[str], frozenset[int], str]] = []
        for edge, place in ((preset.keep_first_blocks, "first"), (preset.keep_last_blocks, "last")):
            if edge is None:
                continue
            pattern = _compiled(edge.pattern)
            numbers = sorted({int(match[1]) for match in map(pattern.search, names) if match})
            chosen = numbers[: edge.count] if place == "first" else numbers[-edge.count :]
            many = f"one of the {place} {edge.count}" if edge.count > 1 else f"the {place}"
            self._edges.append((pattern, frozenset(chosen), f"is {many} of {len(numbers)} blocks"))

    def decide(self, layer: str) -> Decision:
        """What becomes of a layer: a tensor's key without its `.weight`, or any other key as it is."""
        inside = layer.startswith(self.prefix)
        name = layer[len(self.prefix) :] if inside else layer
        needless = _first(self.preset.drop, name)
        if needless is not None and self._allow_drop:
            return Decision("drop", needless.why)
        remark = "" if needless is None else f" It could be dropped: {needless.why}"
        rule = _first(self.preset.keep, name)
        if rule is not None:
            return Decision("keep", rule.why + remark)
        if not inside:
            return Decision("keep", f"It is no part of the model that the preset {self.preset.name} describes.{remark}")
        for pattern, numbers, which in self._edges:
            match = pattern.search(name)
            if match and int(match[1]) in numbers:
                return Decision("keep", f"Block {match[1]} {which}, which stay in high precision.{remark}")
        return Decision("quantize", f"No rule of the preset {self.preset.name} keeps it.{remark}")

    def is_embedding(self, layer: str) -> bool:
        """Whether the layer's weight is a table whose rows are looked up."""
        name = layer.removeprefix(self.prefix)
        return any(_compiled(pattern).search(name) for pattern in self.preset.embedding)

    def is_transposed_bank(self, layer: str) -> bool:
        """Whether the layer, which is a bank of experts, has the axes [E, K, N]."""
        name = layer.removeprefix(self.prefix)
        return any(_compiled(pattern).search(name) for pattern in self.preset.bank_transposed)

    def follows_gelu(self, layer: str) -> bool:
        """Whether the layer's input is what a GELU gave."""
        name = layer.removeprefix(self.prefix)
        return any(_compiled(pattern).search(name) for pattern in self.preset.after_gelu)


def sample_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Every kind of key once: of block 3 and deeper only the first, so that depth costs no time."""
    kinds: dict[str, str] = {}
    for key in keys:
        kinds.setdefault(_DEEP.sub(".#.", key, count=1), key)
    return tuple(kinds.values())


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(map(_compiled(pattern).search, names))


def _first(rules: Iterable[Rule], name: str) -> Rule | None:
    return next((rule for rule in rules if _compiled(rule.pattern).search(name)), None)
