"""The page that compares formats on one model: size against quality, layer by layer, sentence by sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .axes import Axis, nines, nines_label, spread
from .metrics import Agreement
from .page import COLOURS, render, write

_HEIGHT = 320  # pixels of the scatter plot
_ROOM = 1.2  # times the largest size: to the right of the dots there is room for names
_NEAR = 22  # percent of the width within which another point is in the way of a name
_CHARACTER = 1.9  # percent of the width that a letter takes on a phone
_MARGIN = 16  # pixels that keep dots off the edges
_LABEL_GAP = 18  # pixels between two labels
_PADDING = 0.15  # of a nine, at both ends of an axis


@dataclass(frozen=True)
class Variant:
    """One format: the size of its file, what it took, what its weights and the model's embeddings lost.

    `sqnr`: the mean over the quantized layers, each counting as much as it has weights, dB. `groups`: mean SQNR by
    group of layers, dB.
    """

    spec: str
    solver: str
    file_bytes: int
    convert_seconds: float
    run_seconds: float
    bits_per_weight: float
    sqnr: float
    lowest_sqnr: float
    lowest_layer: str
    agreement: Agreement
    groups: Mapping[str, float] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The format's name without its fields."""
        return self.spec.partition("(")[0]


@dataclass(frozen=True)
class ComparisonPage:
    """A model in several formats beside the original: its name, size, the time of a run, and the inputs."""

    model: str
    original_bytes: int
    original_dtype: str
    weights: int
    run_seconds: float
    variants: Sequence[Variant]
    sentences: Sequence[str]
    versions: Mapping[str, str]
    command: str
    seconds: float


def write_comparison(path: str | Path, page: ComparisonPage) -> None:
    """Write the page of a comparison. Raises `WriteError` when it cannot be written."""
    write(path, comparison_html(page))


def comparison_html(page: ComparisonPage) -> str:
    """The page as text."""
    ordered = sorted(page.variants, key=lambda variant: (variant.file_bytes, -variant.agreement.mean))
    families = list(dict.fromkeys(variant.family for variant in page.variants))
    colours = {name: index % COLOURS + 1 for index, name in enumerate(families)}
    return render(
        "comparison.html.jinja",
        page=page,
        colours=colours,
        scatter=_scatter(ordered, colours),
        strips=_strips(ordered, colours),
        heat=_heat(page.variants),
        sentences=_sentences(page, ordered),
        smallest=ordered[0] if ordered else None,
        closest=max(ordered, key=lambda variant: variant.agreement.mean, default=None),
    )


def _quality_axis(values: Sequence[float]) -> Axis:
    """An axis of nines that holds these, with a tick at 0.9, 0.99 and so on."""
    low, high = min(values) - _PADDING, max(values) + _PADDING
    return Axis(low, high, tuple(float(tick) for tick in range(math.ceil(low), math.floor(high) + 1)))


def _unbeaten(variants: Sequence[Variant]) -> list[Variant]:
    """Those that no other beats in quality at the same size or less; sizes within 2 % count as the same."""

    def beaten(one: Variant) -> bool:
        room = one.file_bytes * 1.02
        return any(other.file_bytes <= room and other.agreement.mean > one.agreement.mean for other in variants)

    return [variant for variant in variants if not beaten(variant)]


def _best_of_families(variants: Sequence[Variant]) -> list[Variant]:
    """Of each family the one with the best quality."""
    best: dict[str, Variant] = {}
    for variant in variants:
        if variant.family not in best or variant.agreement.mean > best[variant.family].agreement.mean:
            best[variant.family] = variant
    return list(best.values())


@dataclass(frozen=True)
class _Point:
    """A variant on the scatter plot: `x` in percent, `y` down in pixels, `label` where its name stands, if anywhere."""

    variant: Variant
    x: float
    y: float
    colour: int
    large: bool
    label: float | None = None
    left: bool = False


def _scatter(variants: Sequence[Variant], colours: Mapping[str, int]) -> dict[str, Any] | None:
    """Size to the right, quality upward; the best of each family carries its name, what nothing beats is larger."""
    if not variants:
        return None
    across = Axis.around([_ROOM * max(v.file_bytes for v in variants) / 1e6], zero=True)
    up = _quality_axis([nines(v.agreement.mean) for v in variants])

    def down(value: float) -> float:
        return round(_MARGIN + (_HEIGHT - 2 * _MARGIN) * (1 - up.percent(value) / 100), 2)

    unbeaten = _unbeaten(variants)
    points = [
        _Point(v, across.percent(v.file_bytes / 1e6), down(nines(v.agreement.mean)), colours[v.family], v in unbeaten)
        for v in variants
    ]
    return {
        "height": _HEIGHT,
        "x_ticks": [(across.percent(tick), f"{tick:g}") for tick in across.ticks],
        "y_ticks": [(down(tick), nines_label(tick)) for tick in up.ticks],
        "points": _labelled(points, _best_of_families(variants)),
    }


def _labelled(points: Sequence[_Point], named: Sequence[Variant]) -> list[_Point]:
    """The points with a place for the names of some: to the right, or to the left where there is no room."""

    def crowded(one: _Point) -> bool:
        in_the_way = any(0 < other.x - one.x < _NEAR and abs(other.y - one.y) < _LABEL_GAP for other in points)
        return in_the_way or one.x + _CHARACTER * len(one.variant.spec) > 100

    found = {id(point): point for point in points}
    for left in (True, False):
        side = [point for point in points if point.variant in named and crowded(point) == left]
        places = spread([point.y for point in side], _LABEL_GAP, _MARGIN, _HEIGHT - _MARGIN)
        found |= {id(point): replace(point, label=at, left=left) for point, at in zip(side, places, strict=True)}
    return list(found.values())


def _strips(variants: Sequence[Variant], colours: Mapping[str, int]) -> dict[str, Any] | None:
    """One strip a format: a tick for each sentence, and a dot for the mean."""
    if not variants:
        return None
    axis = _quality_axis(
        [nines(value) for variant in variants for value in (variant.agreement.worst, max(variant.agreement.cosines))]
    )
    return {
        "ticks": [(axis.percent(tick), nines_label(tick)) for tick in axis.ticks],
        "rows": [
            {
                "variant": variant,
                "colour": colours[variant.family],
                "mean": axis.percent(nines(variant.agreement.mean)),
                "each": [axis.percent(nines(value)) for value in variant.agreement.cosines],
            }
            for variant in sorted(variants, key=lambda variant: -variant.agreement.mean)
        ],
    }


def _heat(variants: Sequence[Variant]) -> dict[str, Any] | None:
    """SQNR by format and group of layers, with how strongly to colour each cell in percent."""
    groups = list(dict.fromkeys(name for variant in variants for name in variant.groups))
    values = [value for variant in variants for value in variant.groups.values()]
    if not values:
        return None
    low, high = min(values), max(values)
    rows = []
    for variant in variants:
        cells = [variant.groups.get(name) for name in groups]
        shade = [None if cell is None else round(12 + 76 * (cell - low) / max(high - low, 1e-9)) for cell in cells]
        rows.append({"spec": variant.spec, "cells": list(zip(cells, shade, strict=True))})
    return {"groups": groups, "rows": rows}


def _sentences(page: ComparisonPage, variants: Sequence[Variant]) -> list[tuple[str, float, str]]:
    """Every sentence with its lowest cosine and the format that has it, the lowest first."""
    found = []
    for index, sentence in enumerate(page.sentences):
        worst = min(variants, key=lambda variant: variant.agreement.cosines[index], default=None)
        if worst is not None:
            found.append((sentence, worst.agreement.cosines[index], worst.spec))
    return sorted(found, key=lambda entry: entry[1])
