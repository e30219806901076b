"""Reading the families from their files, finding one by name or by the names of a checkpoint's tensors.

Nothing is read before it is asked for, but GENERIC. A file is checked strictly: a field that is misspelt would
otherwise be a rule that silently does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowbit.errors import PlanError

from .base import EdgeBlocks, Preset, Rule, sample_keys

__all__ = ["GENERIC", "detect_preset", "get_preset", "presets"]

_FOLDER = Path(__file__).parent
_BASE = "base.json"
_OPTIONAL = {
    *("aliases", "prefixes", "keep", "drop", "embedding", "bank_transposed"),
    *("keep_first_blocks", "keep_last_blocks", "after_gelu"),
}


def presets() -> dict[str, Preset]:
    """All families by name, sorted."""
    return dict(_families())


def get_preset(name: str) -> Preset:
    """The family of this name or alias.

    Raises:
        PlanError: there is none; the message lists the names.
    """
    found = _by_any_name().get(name)
    if found is None:
        raise PlanError(f"unknown preset {name!r}; use auto, none or one of: {', '.join(_families())}")
    return found


def detect_preset(keys: Iterable[str]) -> Preset | None:
    """The family of a checkpoint by the names of its tensors, or None where none is recognized.

    Where several match (one file that holds several models), the one with the most tensors under its prefix wins; then
    the one with the most conditions, which is the most specific; then the first by name.
    """
    keys = tuple(keys)
    sample = sample_keys(keys)
    found = [(prefix, p) for p in _families().values() if (prefix := p.find_prefix(sample)) is not None]
    return min(found, key=lambda pair: _rank(pair[0], pair[1], keys))[1] if found else None


def _rank(prefix: str, preset: Preset, keys: Sequence[str]) -> tuple[int, int, str]:
    covered = sum(key.startswith(prefix) for key in keys)
    return -covered, -len(preset.detect_all) - len(preset.detect_none), preset.name


@lru_cache(maxsize=1)
def _families() -> dict[str, Preset]:
    found = [read_family(path) for path in sorted(_FOLDER.glob("*.json")) if path.name != _BASE]
    return {preset.name: preset for preset in sorted(found, key=lambda preset: preset.name)}


@lru_cache(maxsize=1)
def _by_any_name() -> dict[str, Preset]:
    names = dict(_families())
    for preset in _families().values():
        for alias in preset.aliases:
            if alias in names:
                raise PlanError(f"presets {names[alias].name} and {preset.name}: both are called {alias!r}; rename one")
            names[alias] = preset
    return names


def read_family(path: Path) -> Preset:
    """One family from its file, the rules of base.json added to its own.

    Raises:
        PlanError: a field is missing, unknown or of the wrong kind; the message names file and field.
    """
    data = _object(json.loads(path.read_text("utf-8")), path.name, {"name", "title", "detect"}, _OPTIONAL)
    keep, embedding = _base()
    detect = _object(data["detect"], f"{path.name}: detect", {"all", "none"}, set())
    return Preset(
        _text(data["name"], f"{path.name}: name"),
        _text(data["title"], f"{path.name}: title"),
        _texts(data.get("aliases", []), f"{path.name}: aliases"),
        _texts(detect["all"], f"{path.name}: detect.all"),
        _texts(detect["none"], f"{path.name}: detect.none"),
        _texts(data.get("prefixes", []), f"{path.name}: prefixes"),
        _rules(data.get("keep", []), f"{path.name}: keep") + keep,
        _rules(data.get("drop", []), f"{path.name}: drop"),
        _texts(data.get("embedding", []), f"{path.name}: embedding") + embedding,
        _edge(data.get("keep_first_blocks"), f"{path.name}: keep_first_blocks"),
        _edge(data.get("keep_last_blocks"), f"{path.name}: keep_last_blocks"),
        _texts(data.get("bank_transposed", []), f"{path.name}: bank_transposed"),
        _texts(data.get("after_gelu", []), f"{path.name}: after_gelu"),
    )


@lru_cache(maxsize=1)
def _base() -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    data = _object(json.loads((_FOLDER / _BASE).read_text("utf-8")), _BASE, {"keep", "embedding"}, set())
    return _rules(data["keep"], f"{_BASE}: keep"), _texts(data["embedding"], f"{_BASE}: embedding")


def _object(value: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"{where}: expected an object, found {type(value).__name__}")
    if missing := sorted(required - value.keys()):
        raise PlanError(f"{where}: misses {', '.join(missing)}")
    if unknown := sorted(value.keys() - required - optional):
        known = ", ".join(sorted(required | optional))
        raise PlanError(f"{where}: unknown field {', '.join(unknown)}; the fields are {known}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise PlanError(f"{where}: expected a text, found {value!r}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise PlanError(f"{where}: expected a list of texts, found {value!r}")
    return tuple(_text(entry, where) for entry in value)


def _rules(value: Any, where: str) -> tuple[Rule, ...]:
    if not isinstance(value, list):
        raise PlanError(f"{where}: expected a list of rules, found {value!r}")
    found = [_object(entry, where, {"pattern", "why"}, set()) for entry in value]
    return tuple(Rule(_text(entry["pattern"], where), _text(entry["why"], where)) for entry in found)


def _edge(value: Any, where: str) -> EdgeBlocks | None:
    if value is None:
        return None
    entry = _object(value, where, {"pattern", "count"}, set())
    count = entry["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise PlanError(f"{where}: count is {count!r}, expected a number of blocks from 1")
    return EdgeBlocks(_text(entry["pattern"], where), count)


GENERIC = read_family(_FOLDER / "generic.json")
