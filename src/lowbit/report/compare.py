"""The page that compares several conversions of one model: a table to sort and filter, and where the errors are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare_charts import Point, Series, decibel_chart, error_chart, frontier, histogram_bars, type_strips
from .end_to_end import EndToEnd
from .page import COLOURS, db, render, size, write


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of a layer's weights in steps: counts in bins of width `width` around zero, and what lies outside."""

    counts: Sequence[int]
    width: float
    beyond: int
    largest: float
    rms: float


@dataclass(frozen=True)
class CompareLayer:
    """One layer of one candidate.

    `kind`: its name with `*` for the number of its block; `block`: that block's name, "" for none. `status`:
    "quantized", "kept" or "changed". `sqnr`, `output_sqnr` and `gain` (over plain rounding) in dB; `flips`, `at_ends`
    and `saturated` are shares; None is unknown.
    """

    candidate: str
    name: str
    kind: str
    block: str
    format: str
    status: str
    shape: tuple[int, int]
    bytes: int
    sqnr: float
    output_sqnr: float | None
    gain: float | None
    cosine: float
    worst_row: float
    flips: float | None
    at_ends: float | None
    saturated: float | None
    errors: ErrorCounts | None = None

    @property
    def quality(self) -> float:
        """SQNR of the output where it is known, else of the weight."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CompareCandidate:
    """One candidate as a whole; its SQNRs and the shares are those over all layers that any candidate quantizes."""

    name: str
    path: str
    bytes: int
    sqnr: float
    output_sqnr: float | None
    gain: float | None
    flips: float | None
    at_ends: float
    saturated: float
    run: EndToEnd | None = None

    @property
    def quality(self) -> float:
        """SQNR of the outputs where they are known, else of the weights."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr


@dataclass(frozen=True)
class ComparePage:
    """A reference, its candidates, the layers of all of them; in words what is wrong, and what only one of two has."""

    reference: str
    reference_bytes: int
    candidates: Sequence[CompareCandidate]
    layers: Sequence[CompareLayer]
    problems: Sequence[str]
    command: str
    absences: Sequence[str] = ()

    @property
    def with_output(self) -> bool:
        """Whether the error of outputs was measured anywhere."""
        return any(layer.output_sqnr is not None for layer in self.layers)


def write_compare(path: str | Path, page: ComparePage) -> None:
    """Write the page. Raises `WriteError` when it cannot be written."""
    write(path, compare_html(page))


def compare_html(page: ComparePage) -> str:
    """The page as text."""
    colours = {candidate.name: index % COLOURS + 1 for index, candidate in enumerate(page.candidates)}
    judged = {layer.name for layer in page.layers if layer.status != "kept"}
    layers = [layer for layer in page.layers if layer.name in judged]
    lossy = sorted((layer for layer in layers if layer.status != "kept"), key=_badness)
    seen, unseen = _by_statistics(layers)
    measures = list(dict.fromkeys(name for c in page.candidates if c.run is not None for name in c.run.measures))
    return render(
        "compare.html.jinja",
        page=page,
        colours=colours,
        rows=sorted(page.layers, key=_badness),
        left_out=len({layer.name for layer in unseen}),
        formats=sorted({layer.format for layer in lossy}),
        worst=lossy[0] if lossy else None,
        measures=measures,
        shown=measure,
        frontiers=_frontiers(page, colours),
        depth=_by_depth(seen, colours),
        blocks=_blocks(page.candidates, colours),
        strips=type_strips(seen, colours),
        weight_strips=type_strips(unseen, colours),
        histograms=[(layer, histogram_bars(layer.errors)) for layer in lossy if layer.errors is not None],
    )


def measure(name: str, value: float | None) -> str:
    """An end-to-end measure in words."""
    if value is None:
        return "-"
    if "agreement" in name:
        return f"{100 * value:.2f} %"
    return f"{value:.2f}" if "dB" in name else f"{value:.3g}"


def _badness(layer: CompareLayer) -> tuple[bool, float]:
    """Layers whose outputs are known come first: SQNRs of weights are not to be compared with those of outputs."""
    broken = math.isnan(layer.quality)
    return layer.output_sqnr is None and not broken, -math.inf if broken else layer.quality


def _by_statistics(layers: Sequence[CompareLayer]) -> tuple[list[CompareLayer], list[CompareLayer]]:
    """Layers that are judged by their outputs, and those by their weights where others are judged by outputs."""
    known = {layer.name for layer in layers if layer.output_sqnr is not None}
    if not known:
        return list(layers), []
    alike = [layer for layer in layers if layer.name in known]
    seen = [layer for layer in alike if layer.output_sqnr is not None or not math.isfinite(layer.sqnr)]
    return seen, [layer for layer in layers if layer.name not in known]


def _frontiers(page: ComparePage, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """Size against quality: by SQNR, and where the model was run by its error too."""
    what = "SQNR of the layers' outputs" if page.with_output else "SQNR of the weights"
    points = [Point(c.name, c.bytes / 1e6, c.quality, f"{size(c.bytes)}, {db(c.quality)}") for c in page.candidates]
    found = [{"title": what, "unit": "dB", **chart} for chart in [frontier(points, colours)] if chart]
    runs = [(c, c.run) for c in page.candidates if c.run is not None]
    if runs:
        name = runs[0][1].error[0]
        points = [
            Point(c.name, c.bytes / 1e6, run.error[1], f"{size(c.bytes)}, {name} {measure(name, run.error[1])}")
            for c, run in runs
        ]
        found += [{"title": f"{name}, end to end", "unit": "", **x} for x in [frontier(points, colours, log=True)] if x]
    return found


def _by_depth(layers: Sequence[CompareLayer], colours: Mapping[str, int]) -> dict[str, Any] | None:
    """The mean quality of each block, a line a candidate."""
    names = list(dict.fromkeys(layer.block for layer in layers if layer.block))
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for layer in layers:
        ratio, weights = sums.get((layer.candidate, layer.block), (0.0, 0))
        noise = 10 ** (-max(layer.quality, -300.0) / 10)  # NaN stays NaN: max keeps its first argument then
        sums[layer.candidate, layer.block] = ratio + noise * layer.weights, weights + layer.weights
    series = []
    for candidate in colours:
        values = []
        for name in names:
            ratio, weights = sums.get((candidate, name), (0.0, 0))
            values.append(-10 * math.log10(ratio / weights) if ratio > 0 else math.nan)
        series.append(Series(candidate, values, colours[candidate]))
    return decibel_chart(names, series)


def _blocks(candidates: Sequence[CompareCandidate], colours: Mapping[str, int]) -> dict[str, Any] | None:
    """The error of each block's output when the model is run, accumulated and isolated."""
    runs = [(c.name, c.run.blocks) for c in candidates if c.run is not None and c.run.blocks]
    if not runs:
        return None
    names = [block.name for block in runs[0][1]]
    series = []
    for name, blocks in runs:
        series.append(Series(name, [block.accumulated for block in blocks], colours[name]))
        series.append(Series(f"{name}, alone", [block.isolated for block in blocks], colours[name], dashed=True))
    return error_chart(names, series)
