"""Tables of measurements from the files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

from docs_formats import bits
from docs_text import table

import lowbit

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def sentences() -> str:
    """MiniLM: the error of sentence embeddings, calibrated, on text of the same and of another kind."""
    rows = json.loads((RESULTS / "minilm_quality.json").read_text())["rows"]
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["format"], {})[row["calibrated_on"]] = row
    lines = []
    for spec, by_genre in found.items():
        row = by_genre["everyday"]
        error, share = row["error"], row["share"]
        fmt = lowbit.parse_spec(spec)
        lines.append(
            (
                f"`{spec}`",
                f"{bits(fmt):.2f}",
                f"{error['everyday'] / share['everyday']:.4f}",
                f"{error['everyday']:.4f} ({share['everyday']:.2f})",
                f"{error['reference']:.4f} ({share['reference']:.2f})",
            )
        )
    head = ("format", "bits a weight", "plain rounding", "calibrated, same kind of text", "calibrated, another kind")
    return table(head, lines)


def diffusion() -> str:
    """The small diffusion transformer: samples against those of full precision."""
    rows = json.loads((RESULTS / "digits_dit.json").read_text())["rows"]
    lines = [(row["name"], f"{row['psnr']:.1f}") for row in rows]
    return table(("what", "PSNR of samples, dB"), lines)
