"""Tables and the plot of speed on a CPU, from benchmarks/results/cpu.json and cpu_models.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from docs_text import table

from lowbit.report.axes import spread

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
BF16, INT4PACK = "bf16 F.linear", "_weight_int4pack_mm_for_cpu"
PLOTTED = ("awq_w4a16", "nvfp4", "fp8_e4m3", "int8", "int4_plain_mm", "svdquant_w4a4", BF16, INT4PACK)
# Light and dark, as in the reports that `lowbit convert` writes.
COLOURS = ("#2a78d6 #5aa2f2", "#c2590f #f08a45", "#0f8a6b #35c09a", "#8a4fc7 #b98af0", "#b03060 #ee7a9f",
           "#7a6a00 #cdb93a", "#6b6b66 #a5a49d", "#0b7f9e #46c0dd")  # fmt: skip
WIDTH, HEIGHT = 760, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 58, 176, 34, 44
GAP = 15  # pixels between two labels
Group = Mapping[str, Any]


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# ---- tables ----------------------------------------------------------------------------------------------------------


def cpu_machine() -> str:
    """What was measured on: one sentence."""
    section = _read("cpu.json")["linears"]
    about = section["machine"]
    units = [
        name for name in about["features"] if name in {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"}
    ]
    read = max(group["read_gb_s"] for group in section["groups"])
    peaks = ", ".join(f"{name} {speed:.0f}" for name, speed in section["peaks"].items())
    used = f"`{about['isa']}`" if about["isa"] else "no compiled kernels"
    return (
        f"{about['cpu']}, {about['threads']} threads, {', '.join(units) or 'no vector extensions'}; instruction set of "
        f"the kernels: {used}; PyTorch {about['versions']['torch']}; commit {about['commit']}. Its memory reads "
        f"{read:.0f} GB/s; PyTorch's largest products reach, in GFLOP/s: {peaks}."
    )


def cpu_linears() -> str:
    """Times as fast as bfloat16 F.linear, by format, shape and tokens, with quartiles."""
    groups = _read("cpu.json")["linears"]["groups"]
    tokens = _tokens(groups)
    lines = []
    for shape, by_tokens in _by_shape(groups).items():
        for name in _ours(by_tokens):
            rows = [_row(by_tokens.get(m), name) for m in tokens]
            found = [row for row in rows if row]
            kernels = dict.fromkeys(row["kernel"]["name"] for row in found)
            lines.append(
                (shape, f"`{name}`", ", ".join(f"`{kernel}`" for kernel in kernels), f"{found[0]['share']:.0%}",
                 *(_ratio(row, BF16) for row in rows))
            )  # fmt: skip
    head = ("weight", "what", "kernel", f"of reading, M = {tokens[0]}", *(f"M = {m}" for m in tokens))
    return table(head, lines)


def cpu_zen4() -> str:
    """The same of a processor that is fast at bfloat16: a cell has the ratio of each shape."""
    groups = _read("cpu_zen4.json")["linears"]["groups"]
    tokens, shapes = _tokens(groups), _by_shape(groups)
    lines = []
    for name in _ours(next(iter(shapes.values()))):
        cells = []
        for m in tokens:
            rows = [_row(by_tokens[m], name) for by_tokens in shapes.values()]
            cells.append(", ".join(f"{row['ratios'][BF16]['ratio']:.2f}" for row in rows if row))
        lines.append((f"`{name}`", *cells))
    return table((" and ".join(shapes), *(f"M = {m}" for m in tokens)), lines)


def cpu_peers() -> str:
    """Times as fast as the peers of each format, on the first shape."""
    groups = _read("cpu.json")["linears"]["groups"]
    tokens = _tokens(groups)
    by_tokens = next(iter(_by_shape(groups).values()))
    lines = []
    for name in _ours(by_tokens):
        rows = [_row(by_tokens.get(m), name) for m in tokens]
        found = dict.fromkeys(peer for row in rows if row for peer in row["ratios"] if peer != BF16)
        lines += [(f"`{name}`", peer, *(_ratio(row, peer) for row in rows)) for peer in found]
    return table(("what", "against", *(f"M = {m}" for m in tokens)), lines)


def cpu_codecs() -> str:
    """Encoders and decoders: millions of weights a second and the share of copying."""
    codecs = _read("cpu.json")["codecs"]
    heads: tuple[str, ...] = ("format", "what", "kernel", "million weights a second", "of copying")
    if "clone_gb_s" in codecs:
        heads = (*heads, "into fresh memory", "of cloning")
    lines = [
        (
            f"`{row['format']}`",
            row["what"],
            f"`{row['kernel']}`",
            f"{row['weights_s'] / 1e6:.0f}",
            f"{row['share']:.0%}",
            *((f"{row['fresh']['weights_s'] / 1e6:.0f}", f"{row['fresh']['share']:.0%}") if "fresh" in row else ()),
        )
        for row in codecs["rows"]
    ]
    return table(heads, lines)


def cpu_models() -> str:
    """Whole models against bfloat16 and float32."""
    lines = []
    for title, result in _read("cpu_models.json").items():
        for row in result["rows"]:
            kernel = f"`{row['kernel']}`" if row["kernel"] else ""
            ratios = [_ratio(row, other) for other in ("bfloat16", "float32")]
            lines.append((title, row["name"], kernel, f"{1e3 * row['seconds']:.1f}", *ratios))
    return table(("model", "weights", "kernel", "ms", "times as fast as bfloat16", "as float32"), lines)


def _tokens(groups: Sequence[Group]) -> list[int]:
    return sorted({group["tokens"] for group in groups})


def _by_shape(groups: Sequence[Group]) -> dict[str, dict[int, Group]]:
    found: dict[str, dict[int, Group]] = {}
    for group in groups:
        found.setdefault("{}x{}".format(*group["shape"]), {})[group["tokens"]] = group
    return found


def _ours(by_tokens: Mapping[int, Group]) -> list[str]:
    return list(dict.fromkeys(row["name"] for group in by_tokens.values() for row in group["rows"] if row["ours"]))


def _row(group: Group | None, name: str) -> dict[str, Any] | None:
    return next((row for row in group["rows"] if row["name"] == name), None) if group else None


def _ratio(row: Mapping[str, Any] | None, peer: str) -> str:
    found = row["ratios"].get(peer) if row else None
    if found is None:
        return ""
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


# ---- the plot --------------------------------------------------------------------------------------------------------


def cpu_plot() -> str:
    """GFLOP/s and GB/s against the tokens, as an SVG: both axes logarithmic, what the machine can do as lines."""
    result = _read("cpu.json")
    section = result.get("curve", result["linears"])
    groups = next(iter(_by_shape(section["groups"]).values()))
    read = max(group["read_gb_s"] for group in groups.values())
    peaks = section["peaks"]
    # A dtype that the processor has no products for is no limit of anything.
    limits = {f"{name} product": speed for name, speed in peaks.items() if speed >= peaks["float32"]}
    shape = " x ".join(str(size) for size in next(iter(groups.values()))["shape"])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">'
    )
    panels = [
        *_panel(0, f"GFLOP/s by tokens, weight {shape}", _series(groups, "gflop_s"), limits),
        *_panel(HEIGHT, "GB/s of weights and scales", _series(groups, "gb_s"), {"reading memory": read}),
    ]
    title = f"<title>Speed on a CPU by number of tokens, weight {shape}</title>"
    return "\n".join([head, title, _style(), *panels, "</svg>\n"])


def _style() -> str:
    """The colours, by what the reader's system prefers."""

    def colours(dark: int) -> str:
        pairs = [pair.split() for pair in COLOURS]
        return "".join(
            f".c{i}{{stroke:{pair[dark]}}}text.c{i},circle.c{i}{{fill:{pair[dark]}}}" for i, pair in enumerate(pairs)
        )

    def ink(text: str, grid: str) -> str:
        return f".ink{{fill:{text}}}.grid{{stroke:{grid}}}.limit{{stroke:{text}}}"

    fixed = "path{fill:none;stroke-width:2}.peer{stroke-dasharray:3 3}.limit{stroke-dasharray:6 4}"
    light = f"{ink('#22221f', '#dddcd6')}{colours(0)}"
    dark = f"{ink('#e8e7e2', '#3a3936')}{colours(1)}"
    return f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}{fixed}text{{stroke:none!important}}</style>"


def _series(groups: Mapping[int, Group], key: str) -> dict[str, list[tuple[int, float]]]:
    """Name -> (tokens, value), of what is plotted and was measured."""
    found = {}
    for name in PLOTTED:
        rows = [(m, _row(groups[m], name)) for m in sorted(groups)]
        if values := [(m, row[key]) for m, row in rows if row]:
            found[name] = values
    return found


def _panel(
    top: int, title: str, series: Mapping[str, Sequence[tuple[int, float]]], limits: Mapping[str, float]
) -> Iterator[str]:
    tokens = sorted({m for points in series.values() for m, _ in points})
    values = [*(value for points in series.values() for _, value in points), *limits.values()]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    right, bottom = WIDTH - RIGHT, top + HEIGHT - BOTTOM
    last = max(math.log2(tokens[-1] / tokens[0]), 1.0)

    def across(m: float) -> float:
        return round(LEFT + (right - LEFT) * math.log2(m / tokens[0]) / last, 1)

    def down(value: float) -> float:
        return round(bottom - (bottom - top - TOP) * (math.log10(value) - low) / max(high - low, 1), 1)

    yield f'<text class="ink" x="{LEFT}" y="{top + 20}" font-weight="600">{escape(title)}</text>'
    for power in range(low, high + 1):
        y = down(10.0**power)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text class="ink" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>'
    for m in tokens:
        yield f'<line class="grid" x1="{across(m)}" x2="{across(m)}" y1="{top + TOP}" y2="{bottom}"/>'
        yield f'<text class="ink" x="{across(m)}" y="{bottom + 18}" text-anchor="middle">{m}</text>'
    yield f'<text class="ink" x="{(LEFT + right) / 2}" y="{bottom + 36}" text-anchor="middle">tokens</text>'
    for value in limits.values():
        yield f'<line class="limit" x1="{LEFT}" x2="{right}" y1="{down(value)}" y2="{down(value)}"/>'
    for name, points in series.items():
        path = " ".join(f"{'ML'[index > 0]}{across(m)} {down(value)}" for index, (m, value) in enumerate(points))
        index, peer = PLOTTED.index(name), " peer" if name in {BF16, INT4PACK} else ""
        yield f'<path class="c{index}{peer}" d="{path}"/>'
        for m, value in points:
            tip = escape(f"{name}, {m} tokens: {value:.3g}")
            yield f'<circle class="c{index}" cx="{across(m)}" cy="{down(value)}" r="3"><title>{tip}</title></circle>'
    ends = [(name, down(points[-1][1]), f"c{PLOTTED.index(name)}") for name, points in series.items()]
    ends += [(f"{name} {value:.0f}", down(value), "ink") for name, value in limits.items()]
    places = spread([y for _, y, _ in ends], GAP, top + TOP, bottom)
    for (name, _, kind), y in zip(ends, places, strict=True):
        label = "_weight_int4pack_mm" if name == INT4PACK else name
        yield f'<text class="{kind}" x="{right + 10}" y="{round(y + 4, 1)}">{escape(label)}</text>'
