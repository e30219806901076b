"""Rendering a page from its template and writing it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lowbit.text_files import write_text

COLOURS = 8  # how many the style sheet has for kinds of things


def render(template: str, **values: Any) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("lowbit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size, db=db, cosine=cosine, breakable=breakable)
    return environment.get_template(template).render(**values)


def write(path: str | Path, text: str) -> None:
    """Write a page. Raises `WriteError` naming the path when it cannot be written."""
    write_text(path, text, "the report")


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def db(value: float | None) -> str:
    """An SQNR in words."""
    if value is None:
        return "not measured"
    if math.isnan(value):
        return "NaN"
    return f"{value:.1f} dB" if math.isfinite(value) else "exact" if value > 0 else "no signal"


def breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots and underscores, and nowhere else."""
    return escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def cosine(value: float | None) -> str:
    """A cosine with the digits that matter: 0.98, 0.99931, 0.9999987."""
    if value is None or math.isnan(value):
        return "-"
    gap = max(1.0 - value, 1e-7)
    return f"{value:.{min(7, max(3, 2 - math.floor(math.log10(gap))))}f}"
