"""The page of one conversion: what each layer became, what it lost, and where the bytes are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .axes import Axis
from .page import COLOURS, render, write

_WORST = 12


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer. `sqnr` in dB and `cosine` of its weight, None when nothing was verified."""

    name: str
    format: str
    solver: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    sqnr: float | None
    cosine: float | None


@dataclass(frozen=True)
class KeptGroup:
    """Tensors of one kind that were not quantized, and why."""

    name: str
    count: int
    becomes: str
    shape: tuple[int, ...]
    bytes: int
    why: str


@dataclass(frozen=True)
class ConversionPage:
    """A whole conversion: `groups` are the quantized layers by the name of their group; bytes count all tensors."""

    source: str
    target: str
    groups: Sequence[tuple[str, Sequence[LayerRow]]]
    kept: Sequence[KeptGroup]
    preset: str
    notes: Sequence[str]
    bytes_before: int
    bytes_after: int
    seconds: float

    @property
    def layers(self) -> list[LayerRow]:
        """All quantized layers."""
        return [row for _, rows in self.groups for row in rows]


def write_conversion(path: str | Path, page: ConversionPage) -> None:
    """Write the page of a conversion. Raises `WriteError` when it cannot be written."""
    write(path, conversion_html(page))


def conversion_html(page: ConversionPage) -> str:
    """The page as text."""
    layers = page.layers
    formats = sorted({row.format for row in layers})
    colours = {name: index % COLOURS + 1 for index, name in enumerate(formats)}
    measured = sorted((row for row in layers if row.sqnr is not None), key=_sqnr)
    weights = sum(math.prod(row.shape) for row in layers)
    return render(
        "conversion.html.jinja",
        page=page,
        layers=layers,
        colours=colours,
        worst=measured[:_WORST],
        bits=8 * sum(row.bytes_after for row in layers) / max(weights, 1),
        weights=weights,
        strips=_strips(page, colours),
        bars=_bars(page),
    )


def _sqnr(row: LayerRow) -> float:
    return -math.inf if row.sqnr is None or math.isnan(row.sqnr) else row.sqnr


def _strips(page: ConversionPage, colours: dict[str, int]) -> dict[str, Any] | None:
    """One strip a group with a dot for each layer, the group with the lowest SQNR first."""
    measured = [(name, [row for row in rows if row.sqnr is not None]) for name, rows in page.groups]
    measured = sorted(((name, rows) for name, rows in measured if rows), key=lambda group: min(map(_sqnr, group[1])))
    if not measured:
        return None
    axis = Axis.around(_sqnr(row) for _, rows in measured for row in rows)
    return {
        "ticks": [(axis.percent(tick), f"{tick:g}") for tick in axis.ticks],
        "groups": [
            {
                "name": name,
                "count": len(rows),
                "low": axis.percent(min(map(_sqnr, rows))),
                "high": axis.percent(max(map(_sqnr, rows))),
                "lowest": min(map(_sqnr, rows)),
                "dots": [(axis.percent(_sqnr(row)), colours[row.format], row) for row in rows],
            }
            for name, rows in measured
        ],
    }


def _bars(page: ConversionPage) -> list[dict[str, Any]]:
    """The bytes before and after, in percent of the larger, by what became of them."""
    whole = max(page.bytes_before, page.bytes_after, 1)
    before, after = (sum(getattr(row, side) for row in page.layers) for side in ("bytes_before", "bytes_after"))
    return [
        {
            "name": name,
            "total": total,
            "quantized": 100 * coded / whole,
            "kept": 100 * max(total - coded, 0) / whole,
            "coded": coded,
            "rest": max(total - coded, 0),
        }
        for name, total, coded in (("before", page.bytes_before, before), ("after", page.bytes_after, after))
    ]
