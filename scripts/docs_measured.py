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


def genres() -> str:
    """MiniLM: what is left of plain rounding's error, by the text of the calibration and that of the test."""
    rows = json.loads((RESULTS / "minilm_quality.json").read_text())["rows"]
    tests, lines, before = ("everyday", "novel", "reference"), [], ""
    shown = [row for row in rows if row["format"] in _PLAIN]
    for row in sorted(shown, key=lambda row: (_PLAIN.index(row["format"]), _GENRES.index(row["calibrated_on"]))):
        own = row["calibrated_on"]
        shares = (f"*{row['share'][test]:.2f}*" if test == own else f"{row['share'][test]:.2f}" for test in tests)
        name = f"`{row['format']}`" if row["format"] != before else ""
        lines.append((name, own, *shares, f"{row['seconds']:.0f} s"))
        before = row["format"]
    return table(("format", "calibrated on", *tests, "calibration and conversion"), lines)


_PLAIN = ["fp8_e4m3", "int8(activations=none)", "awq_w4a16", "nvfp4", "svdquant_w4a4"]  # in the order of the table


def peers() -> str:
    """MiniLM: what is left of plain rounding's error and the seconds, beside other tools in the same run."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    rows = json.loads((RESULTS / "minilm_peers.json").read_text())["rows"]
    calibrated = [row for row in rows if row["calibrated_on"] and row["format"] in _PEERS]
    for row in calibrated:
        place = row["format"], row["calibrated_on"], row["tested_on"]
        found.setdefault(place, {}).setdefault(_tool(row), row)
        found[place][_tool(row)] = min(found[place][_tool(row)], row, key=lambda one: one["error"])
    for row in rows:  # those without data are the same whatever the others saw
        for (spec, _, test), tools in found.items():
            if row["method"] == "hqq" and (spec, test) == (row["format"], row["tested_on"]):
                tools["hqq"] = row
    lines, before = [], ""
    for spec, genre, test in sorted(found, key=lambda place: (list(_PEERS).index(place[0]), _GENRES.index(place[1]))):
        tools = found[spec, genre, test]
        if "lowbit" not in tools:  # measured by themselves, elsewhere
            continue
        shares = [f"{tools[name]['of_plain']:.2f}" if name in tools else "" for name in _TOOLS]
        seconds = [f"{tools[name]['seconds']:.0f} s" if name in tools else "" for name in _TOOLS]
        best = min((share for share in shares if share), key=float)
        shares = [f"**{share}**" if share == best else share for share in shares]
        lines.append((_PEERS[spec] if spec != before else "", genre, test, *shares, *seconds))
        before = spec
    head = ("format", "calibrated on", "tested on", *_TOOLS.values(), *_TOOLS.values())
    return table(head, lines)


def peers_by_genre() -> str:
    """The same shares after calibrations on sentences of one genre, tested on another; the newer rows of two files."""
    rows = [
        row
        for name in ("minilm_peers.json", "minilm_peers_zen4.json")
        for row in json.loads((RESULTS / name).read_text())["rows"]
    ]
    found: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for row in rows:
        for genre, test in (("everyday", "reference"), ("reference", "everyday")):
            if row["format"] in _PEERS and row["calibrated_on"] in (genre, None) and row["tested_on"] == test:
                found.setdefault((row["format"], genre, test), {})[_tool(row), row["method"]] = row["of_plain"]
    lines, before = [], ""
    for place in sorted(found, key=lambda place: (list(_PEERS).index(place[0]), place[1])):
        tools = found[place]
        best = {name: min(share for (tool, _), share in tools.items() if tool == name) for name, _ in tools}
        shares = (f"{best[name]:.2f}" if name in best else "" for name in _TOOLS)
        lines.append((_PEERS[place[0]] if place[0] != before else "", *place[1:], *shares))
        before = place[0]
    return table(("format", "calibrated on", "tested on", *_TOOLS.values()), lines)


def _tool(row: dict) -> str:
    return next((name for name in _TOOLS if name in row["method"] and "rtn" not in row["method"]), row["method"])


_PEERS = {
    "fp8_e4m3 tensor": "`fp8_e4m3` tensor",
    "int8 row": "`int8(activations=none)`",
    "int4 g64 asymmetric": "`awq_w4a16` g64",
    "nvfp4": "`nvfp4`",
}
_TOOLS = {"lowbit": "lowbit", "gptq": "GPTQ", "auto-round": "AutoRound", "hqq": "HQQ"}
_GENRES = ["built-in", "built-in, 256", "everyday", "novel", "reference"]


def layers() -> str:
    """One large layer: seconds by step, and the gain."""
    lines, before = [], None
    for row in json.loads((RESULTS / "solve_layer.json").read_text())["rows"]:
        seconds = row["seconds"]
        steps = [f"{value:.1f} s" for name, value in seconds.items() if name != "solve"] or [""] * 3
        shape = " x ".join(map(str, row["shape"])) if row["shape"] != before else ""
        name = f"`{row['format']}`" + (" by ctq" if row["solver"] == "ctq" else "")
        lines.append((shape, name, *steps, f"{seconds['solve']:.1f} s", f"{row['gain']:.1f} dB"))
        before = row["shape"]
    return table(("shape", "format", "start", "`gptq`", "`descent`", "`solve`", "gain"), lines)
