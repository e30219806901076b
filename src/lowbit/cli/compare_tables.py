"""The tables of `lowbit compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowbit.checkpoint.comparison import CandidateComparison, Comparison, LayerComparison
from lowbit.cli.output import decibels, say, show, size, table
from lowbit.report.compare import measure
from lowbit.report.end_to_end import EndToEnd

_SHOWN = 5


def show_layers(found: Comparison, worst: int) -> None:
    """The candidates as a whole, and the worst layers of all of them."""
    _show_totals(found)
    layers = [(candidate, layer) for candidate in found.candidates for layer in candidate.worst(worst)]
    layers.sort(key=lambda entry: -math.inf if math.isnan(entry[1].sqnr) else entry[1].sqnr)
    if worst and layers:
        _show_layers(found, layers[:worst])


def show_rest(found: Comparison, problems: Sequence[str]) -> None:
    """What was kept, what is not known, what only one of two files has, and what is wrong."""
    if found.unmeasured:
        more = f" and {len(found.unmeasured) - _SHOWN} more" if len(found.unmeasured) > _SHOWN else ""
        say(f"no statistics for {', '.join(found.unmeasured[:_SHOWN])}{more}", "yellow")
    for candidate in found.candidates:
        kept = sum(layer.status == "kept" for layer in candidate.layers)
        biases = f", {len(candidate.biases)} biases corrected" if candidate.biases else ""
        say(
            f"{candidate.name}: {len(candidate.quantized)} layers quantized, {kept} kept exactly, "
            f"{candidate.identical} other tensors identical{biases}"
        )
    for absent in found.absences:
        if absent not in problems:
            say(absent, "yellow")
    if found.basis:
        say(found.basis, "yellow")
    for problem in problems:
        say(f"problem: {problem}", "red")


def _show_totals(found: Comparison) -> None:
    output = ("output SQNR",) if found.with_statistics else ()
    numbers = ("size", "of REF", "weight SQNR", *output, "gain", "flips", "at ends", "saturated")
    say(f"{found.reference}, {size(found.reference_bytes)}", "bold")
    rows = table("candidate", *numbers, right=numbers)
    for candidate in found.candidates:
        total = found.totals(candidate)
        rows.add_row(
            candidate.name,
            size(candidate.bytes),
            _share(candidate.bytes / max(found.reference_bytes, 1)),
            decibels(total.sqnr),
            *([decibels(total.output_sqnr)] if output else []),
            _gain(total.gain),
            _share(total.flips),
            _share(total.at_ends),
            _share(total.saturated),
        )
    show(rows)


def show_runs(found: Comparison, runs: Sequence[EndToEnd]) -> None:
    """What the whole model lost, and the error of its blocks: first, in the middle and last."""
    names = list(dict.fromkeys(name for ran in runs for name in ran.measures))
    say(f"end to end: {runs[0].kind}, {runs[0].samples} compared", "bold")
    rows = table("candidate", *names, right=tuple(names))
    for candidate, ran in zip(found.candidates, runs, strict=True):
        rows.add_row(candidate.name, *(measure(name, ran.measures.get(name)) for name in names))
    show(rows)
    blocks = runs[0].blocks
    if not blocks:
        return
    shown = [blocks[index].name for index in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    say("relative squared error of a block's output: with all layers quantized / with this block's alone", "bold")
    rows = table("candidate", *shown, right=tuple(shown))
    for candidate, ran in zip(found.candidates, runs, strict=True):
        by_name = {block.name: block for block in ran.blocks}
        cells = (f"{by_name[name].accumulated:.2e} / {by_name[name].isolated:.2e}" for name in shown)
        rows.add_row(candidate.name, *cells)
    show(rows)


def _show_layers(found: Comparison, layers: Sequence[tuple[CandidateComparison, LayerComparison]]) -> None:
    several = ("candidate",) if len(found.candidates) > 1 else ()
    output = ("output SQNR",) if found.with_statistics else ()
    numbers = ("weight SQNR", *output, "gain", "cosine", "worst row", "flips", "at ends", "saturated")
    rows = table("layer", *several, "format", "shape", *numbers, title="worst layers", right=numbers)
    for candidate, layer in layers:
        measured = layer.measure
        rows.add_row(
            layer.name,
            *([candidate.name] if several else []),
            layer.format,
            "x".join(map(str, layer.shape)),
            decibels(layer.accuracy.sqnr),
            *([decibels(layer.output_sqnr)] if output else []),
            _gain(layer.gain),
            f"{layer.accuracy.cosine:.6f}",
            f"{layer.accuracy.max_row_error:.4f}",
            _share(None if measured is None else measured.flips),
            _share(None if measured is None else measured.at_ends),
            _share(None if measured is None else measured.scales.saturated),
            style="red" if layer.status == "changed" else "",
        )
    show(rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _gain(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} dB"
