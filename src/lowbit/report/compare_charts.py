"""The pictures of the page that compares conversions: places of dots, lines and bars, percent across, pixels down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from .axes import Axis, spread

HEIGHT = 260  # pixels of a chart
_MARGIN = 16  # pixels that keep dots off the edges
_ROOM = 1.15  # times the largest size: room to the right of the dots
_SAME = 1.02  # sizes within 2 % count as the same
_LABEL_GAP = 17  # pixels between two labels
_TICKS = 16  # at most so many labels along the blocks
_LANE = 13  # pixels of a strip for each candidate
_BAR_HEIGHT = 70


@dataclass(frozen=True)
class Point:
    """A candidate on the frontier: size in MB, and a quality in dB or an error; `tip` says both in words."""

    name: str
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Series:
    """A line: one value a block, NaN where there is none."""

    name: str
    values: Sequence[float]
    colour: int
    dashed: bool = False


class Errors(Protocol):
    """Counted errors: see `ErrorCounts`."""

    @property
    def counts(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def width(self) -> float: ...  # noqa: D102
    @property
    def beyond(self) -> int: ...  # noqa: D102


class Layer(Protocol):
    """A layer: see `CompareLayer`."""

    @property
    def candidate(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def quality(self) -> float: ...  # noqa: D102


def _down(axis: Axis) -> Callable[[float], float]:
    """From a value to pixels from the top; large values are at the top."""
    return lambda value: round(_MARGIN + (HEIGHT - 2 * _MARGIN) * (1 - axis.percent(value) / 100), 2)


def _log_axis(values: Sequence[float]) -> Axis:
    """An axis of powers of ten that holds the logarithms of these."""
    logs = [math.log10(value) for value in values] or [-1.0, 0.0]
    low, high = min(logs) - 0.1, max(logs) + 0.1
    ticks = [float(tick) for tick in range(math.ceil(low), math.floor(high) + 1)]
    if len(ticks) < 3:  # few powers of ten: also at 2 and 5
        ticks = [
            math.log10(f * 10.0**p)
            for p in range(math.floor(low), math.ceil(high) + 1)
            for f in (1, 2, 5)
            if low <= math.log10(f * 10.0**p) <= high
        ]
    return Axis(low, high, tuple(ticks))


def frontier(points: Sequence[Point], colours: Mapping[str, int], *, log: bool = False) -> dict[str, Any] | None:
    """Size to the right, quality upward (of errors, with `log`, less is higher); what nothing beats is joined."""
    points = [p for p in points if math.isfinite(p.y) and (p.y > 0 or not log)]
    if not points:
        return None
    across = Axis.around([_ROOM * max(p.x for p in points)], zero=True)
    if log:
        base = _log_axis([p.y for p in points])
        up = Axis(-base.high, -base.low, tuple(-tick for tick in base.ticks))
    else:
        up = Axis.around([p.y for p in points])
    value = {p.name: -math.log10(p.y) if log else p.y for p in points}
    down = _down(up)
    best = [p for p in points if not any(q.x <= _SAME * p.x and value[q.name] > value[p.name] for q in points)]
    best.sort(key=lambda p: p.x)
    places = {p.name: (across.percent(p.x), down(value[p.name])) for p in points}
    labels: dict[str, tuple[float, bool]] = {}
    for left in (False, True):
        side = [p for p in points if (places[p.name][0] > 62) == left]
        heights = spread([places[p.name][1] for p in side], _LABEL_GAP, _MARGIN, HEIGHT - _MARGIN)
        labels |= {p.name: (at, left) for p, at in zip(side, heights, strict=True)}
    return {
        "height": HEIGHT,
        "x_ticks": [(across.percent(tick), f"{tick:g}") for tick in across.ticks],
        "y_ticks": [(down(tick), f"{10**-tick:.3g}" if log else f"{tick:g}") for tick in up.ticks],
        "lines": [(*places[a.name], *places[b.name]) for a, b in pairwise(best)],
        "points": [
            {"name": p.name, "tip": p.tip, "x": places[p.name][0], "y": places[p.name][1], "large": p in best,
             "colour": colours[p.name], "label": labels[p.name][0], "left": labels[p.name][1]}
            for p in points
        ],
    }  # fmt: skip


def decibel_chart(names: Sequence[str], series: Sequence[Series]) -> dict[str, Any] | None:
    """Lines over the blocks in dB; None with fewer than two blocks."""
    values = [value for line in series for value in line.values if math.isfinite(value)]
    if len(names) < 2 or not values:
        return None
    axis = Axis.around(values)
    return _lines(names, series, axis, lambda value: value, lambda tick: f"{tick:g}", lambda value: f"{value:.1f} dB")


def error_chart(names: Sequence[str], series: Sequence[Series]) -> dict[str, Any] | None:
    """Lines of relative errors over the blocks on a logarithmic axis; None with fewer than two blocks."""
    values = [value for line in series for value in line.values if math.isfinite(value) and value > 0]
    if len(names) < 2 or not values:
        return None
    return _lines(
        names,
        series,
        _log_axis(values),
        lambda value: math.log10(value) if value > 0 else math.nan,
        lambda tick: f"{10**tick:.2g}",
        lambda value: f"{value:.3g}",
    )


def _lines(
    names: Sequence[str],
    series: Sequence[Series],
    axis: Axis,
    place: Callable[[float], float],
    tick_text: Callable[[float], str],
    text: Callable[[float], str],
) -> dict[str, Any]:
    down, step = _down(axis), math.ceil(len(names) / _TICKS)
    across = [round(2 + 96 * index / (len(names) - 1), 3) for index in range(len(names))]
    lines = []
    for line in series:
        dots = [
            (x, down(place(value)), f"{line.name}, {name}: {text(value)}")
            for x, value, name in zip(across, line.values, names, strict=True)
            if math.isfinite(value) and math.isfinite(place(value))
        ]
        joined = [(a[0], a[1], b[0], b[1]) for a, b in pairwise(dots)]
        lines.append({"colour": line.colour, "dashed": line.dashed, "dots": dots, "joined": joined, "name": line.name})
    return {
        "height": HEIGHT,
        "x_ticks": [(x, _index(n)) for i, (x, n) in enumerate(zip(across, names, strict=True)) if i % step == 0],
        "y_ticks": [(down(tick), tick_text(tick)) for tick in axis.ticks],
        "lines": lines,
    }


def _index(block: str) -> str:
    """The number at the end of a block's name."""
    return block.rpartition(".")[2]


def type_strips(layers: Sequence[Layer], colours: Mapping[str, int]) -> dict[str, Any] | None:
    """One strip a kind of layer, with a lane a candidate and a dot a layer; the kind with the lowest quality first."""
    finite = [layer for layer in layers if math.isfinite(layer.quality)]
    if not finite:
        return None
    axis = Axis.around(layer.quality for layer in finite)
    lanes = {name: _LANE * index + _LANE for index, name in enumerate(colours)}
    kinds: dict[str, list[Layer]] = {}
    for layer in finite:
        kinds.setdefault(layer.kind, []).append(layer)
    ordered = sorted(kinds.items(), key=lambda entry: min(layer.quality for layer in entry[1]))
    return {
        "height": _LANE * (len(lanes) + 1),
        "ticks": [(axis.percent(tick), f"{tick:g}") for tick in axis.ticks],
        "rows": [
            {
                "name": kind,
                "count": len({layer.name for layer in found}),
                "lowest": min(layer.quality for layer in found),
                "dots": [(axis.percent(x.quality), lanes[x.candidate], colours[x.candidate], _tip(x)) for x in found],
            }
            for kind, found in ordered
        ],
    }


def _tip(layer: Layer) -> str:
    return f"{layer.candidate}, {layer.name}: {layer.quality:.2f} dB"


def histogram_bars(errors: Errors) -> dict[str, Any]:
    """Bars from -2 to 2 steps, and the marks of half a step; heights in pixels."""
    count, most = len(errors.counts), max(*errors.counts, 1)
    bar = 100 / count
    middle = (count - 1) / 2
    return {
        "height": _BAR_HEIGHT,
        "bars": [
            (round(index * bar, 3), round(0.86 * bar, 3), round(_BAR_HEIGHT * value / most, 2))
            for index, value in enumerate(errors.counts)
            if value
        ],
        "half": [round((middle + side * 0.5 / errors.width + 0.5) * bar, 3) for side in (-1, 1)],
        "ticks": [(round((middle + at / errors.width + 0.5) * bar, 3), f"{at:g}") for at in (-2, -1, 0, 1, 2)],
        "outside": errors.beyond / max(sum(errors.counts) + errors.beyond, 1),
    }
