"""Tables of measurements from the files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

from docs_formats import bits
from docs_text import table

import lowbit

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def sentences() -> str:
    """MiniLM: the error of sentence embeddings, calibrated on the built-in text and on text of the test's own kind."""
    rows = json.loads((RESULTS / "minilm_quality.json").read_text())["rows"]
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["format"], {})[row["calibrated_on"]] = row
    lines = []
    for spec, by_genre in found.items():
        if not {"built-in", "reference"} <= set(by_genre):
            continue
        row, own = by_genre["built-in"], by_genre["reference"]["share"]
        error, share = row["error"], row["share"]
        lines.append(
            (
                f"`{spec}`",
                f"{bits(lowbit.parse_spec(spec)):.2f}",
                f"{error['reference'] / share['reference']:.4f}",
                *(f"{share[genre]:.2f}" for genre in ("everyday", "novel", "reference")),
                f"{own['reference']:.2f}",
            )
        )
    tests = ("left on everyday English", "on a novel", "on the reference", "calibrated on the reference")
    head = ("format", "bits a weight", "plain rounding", *tests)
    return table(head, lines)


def diffusion() -> str:
    """The small diffusion transformer: samples against those of full precision."""
    rows = json.loads((RESULTS / "digits_dit.json").read_text())["rows"]
    lines = [(row["name"], f"{row['psnr']:.1f}") for row in rows]
    return table(("what", "PSNR of samples, dB"), lines)
