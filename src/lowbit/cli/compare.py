"""`lowbit compare`: several conversions of one model beside it, layer by layer and end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lowbit.calibration.statistics_file import StatisticsFile
from lowbit.checkpoint.compare import compare as compare_layers
from lowbit.checkpoint.compare_sources import layer_shapes
from lowbit.checkpoint.comparison import CandidateComparison, Comparison, LayerComparison
from lowbit.checkpoint.source import Source, open_source
from lowbit.cli import options
from lowbit.cli.output import Exit, command, decibels, epilog, print_json, progress, say, show, size, table

EPILOG = epilog(
    "lowbit compare model.safetensors model-fp8.safetensors model-nvfp4.safetensors",
    "lowbit compare flux.safetensors flux-nvfp4.safetensors --stats flux.stats --html flux.html",
)
_SHOWN = 5


@command
def compare(
    ref: Annotated[
        Path,
        typer.Argument(metavar="REF", help="What the others were made from; quantized or not.", show_default=False),
    ],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CAND...", help="Conversions of it.", show_default=False)
    ],
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Statistics of `lowbit calibrate`, for the error of each layer's output.",
            show_default=False,
        ),
    ] = None,
    rtn: Annotated[
        bool, typer.Option("--rtn/--no-rtn", help="Also round REF plainly in every layer's format, to compare with.")
    ] = True,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="Show this many layers, the worst first.")] = 10,
    jobs: options.Jobs = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Compare conversions of a model: what each layer lost, which codes and scales are at their ends, and what it cost.

    SQNR: signal over noise in dB, 6 dB are one bit; of the weights, and with --stats of the layers' outputs,
    tr(W H W^T) / tr(E H E^T). Gain: over plain rounding in the same format. Flips: weights that decode to another value
    than after plain rounding. At ends: codes at the ends of their range. Ends with 1 when a tensor that was kept
    differs from REF's, or a scale is not finite.
    """
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(open_source(ref))
        sources = [stack.enter_context(open_source(path)) for path in candidates]
        statistics = _statistics(stack, stats, reference)
        with progress("comparing") as update:
            found = compare_layers(
                reference,
                sources,
                names=_labels(candidates),
                statistics=statistics,
                rtn=rtn,
                jobs=jobs,
                progress=update,
            )
    problems = [problem for candidate in found.candidates for problem in _problems(candidate)]
    if as_json:
        print_json({**found.to_json(), "problems": problems})
    else:
        _show(found, worst, problems)
    if problems:
        raise typer.Exit(Exit.FOUND)


def _statistics(stack: contextlib.ExitStack, path: Path | None, reference: Source) -> StatisticsFile | None:
    """The statistics file, open, and checked against the reference."""
    if path is None:
        return None
    file = stack.enter_context(StatisticsFile.open(path))
    file.check(layer_shapes(reference))
    return file


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names of files that tell them apart."""
    stems = [path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors") for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _problems(candidate: CandidateComparison) -> list[str]:
    """What a conversion should not have done, in words."""
    found = [f"{layer.name}: was kept, but differs ({decibels(layer.sqnr)})" for layer in candidate.altered]
    found += candidate.changed
    found += [f"{name}: is missing" for name in candidate.missing]
    found += [f"{name}: is not in the reference" for name in candidate.extra]
    found += [
        f"{layer.name}: {layer.measure.scales.not_finite} values of its scales are not finite"
        for layer in candidate.quantized
        if layer.measure is not None and layer.measure.scales.not_finite
    ]
    return [f"{candidate.name}: {text}" for text in found]


def _show(found: Comparison, worst: int, problems: Sequence[str]) -> None:
    _show_totals(found)
    layers = [(candidate, layer) for candidate in found.candidates for layer in candidate.worst(worst)]
    layers.sort(key=lambda entry: entry[1].sqnr if entry[1].sqnr == entry[1].sqnr else float("-inf"))
    if worst and layers:
        _show_layers(found, layers[:worst])
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
    for problem in problems:
        say(f"problem: {problem}", "red")


def _show_totals(found: Comparison) -> None:
    output = ("output SQNR",) if found.with_statistics else ()
    numbers = ("size", "of REF", "weight SQNR", *output, "gain", "flips", "at ends", "saturated")
    rows = table("candidate", *numbers, title=f"{found.reference}, {size(found.reference_bytes)}", right=numbers)
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
