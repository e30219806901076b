"""`lowbit verify`: a converted checkpoint against what it was made from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from lowbit.checkpoint.layer_groups import grouped
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import Source, open_source
from lowbit.checkpoint.verify import VerifyResult, verify as compare
from lowbit.cli import options
from lowbit.cli.output import Exit, command, decibels, epilog, print_json, progress, say, show, table
from lowbit.errors import PlanError

EPILOG = epilog(
    "lowbit verify flux.safetensors flux-fp8.safetensors",
    "lowbit verify flux.safetensors flux-nvfp4.safetensors --min-sqnr 18 --worst 30",
)
_LOWEST = float("-inf")
_SHOWN = 5  # problems of one kind


@command
def verify(
    src: options.SourcePath,
    out: Annotated[
        Path, typer.Argument(readable=False, metavar="OUT", help="The converted checkpoint.", show_default=False)
    ],
    min_sqnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="End with 1 when a layer's SQNR is below this many dB.", show_default=False),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="Show this many layers, the worst first.")] = 10,
    jobs: options.Jobs = None,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Decode every layer of OUT, compare it with SRC, and compare every other tensor byte by byte.

    SQNR: 10 log10(signal / noise) of the weights in dB; 6 dB are one bit. Ends with 1 when a layer cannot be
    compared, when another tensor differs or is missing, and when a layer is below --min-sqnr. What --drop-unused left
    out is named, and no problem.
    """
    if min_sqnr is not None and math.isnan(min_sqnr):
        raise PlanError("--min-sqnr nan: write a number of dB, such as 18")
    with open_source(src, source_dialect) as source, open_source(out) as output, progress("verifying") as update:
        result = compare(source, output, jobs=jobs, progress=update)
        nothing = "" if result.layers else _why_nothing(source, output)
    failing = result.failing(_LOWEST if min_sqnr is None else min_sqnr)
    bad = bool(failing or result.problems)
    if as_json:
        names = [layer.name for layer in failing]
        print_json({**result.to_json(), "min_sqnr": min_sqnr, "failing": names, "passed": not bad})
    else:
        _show(result, worst, min_sqnr, nothing)
    if bad:
        raise typer.Exit(Exit.FOUND)


def _why_nothing(source: Source, output: Source) -> str:
    """Why no quantized layer was compared."""
    if _is_quantized(output):
        return "no quantized layer of OUT is in SRC: the two are of different models, or name their layers differently"
    if _is_quantized(source):
        return "nothing in OUT is quantized, and SRC is: the arguments look swapped; the original comes first"
    return "nothing in OUT is quantized"


def _is_quantized(source: Source) -> bool:
    return any(look_for_layers(source, component, strict=False).layers for component in source.components)


def _show(result: VerifyResult, count: int, min_sqnr: float | None, nothing: str) -> None:
    rows = table("layer", "format", "shape", "SQNR", "cosine", "worst row", right=("SQNR", "cosine", "worst row"))
    for layer in result.worst(count):
        assert layer.accuracy is not None
        low = min_sqnr is not None and not layer.passes(min_sqnr)
        rows.add_row(
            layer.name,
            layer.format,
            "x".join(map(str, layer.shape)),
            decibels(layer.accuracy.sqnr),
            f"{layer.accuracy.cosine:.6f}",
            f"{layer.accuracy.max_row_error:.4f}",
            style="red" if low else "",
        )
    if rows.row_count:
        show(rows)
    say(f"{len(result.layers)} quantized layers compared, {result.identical} other tensors identical")
    if result.dropped:
        groups = [name for name, _ in grouped(result.dropped, lambda key: key, lambda _: "")]
        say(f"{len(result.dropped)} tensors of SRC were left out by the conversion: {', '.join(groups)}")
    _show_problems([*result.problems, *(layer.problem for layer in result.layers if layer.problem)])
    if result.unmatched:
        say(f"{result.unmatched} quantized layers of OUT not compared: SRC has none of their names", "yellow")
    if nothing:
        say(nothing, "yellow")
    if min_sqnr is not None:
        below = [layer for layer in result.layers if layer.accuracy is not None and not layer.accuracy.sqnr >= min_sqnr]
        say(f"{len(below)} layers below {min_sqnr:g} dB" if below else f"all layers reach {min_sqnr:g} dB")


def _show_problems(problems: list[str]) -> None:
    """The first few of each kind, and how many more there are: of two unrelated files, every tensor is a problem."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_kind(problem), []).append(problem)
    for found in kinds.values():
        for problem in found[:_SHOWN]:
            say(f"problem: {problem}", "red")
        if len(found) > _SHOWN:
            say(f"problem: ... and {len(found) - _SHOWN} more of this kind; --json names all", "red")


def _kind(problem: str) -> str:
    """A problem without the names and numbers that are of one tensor."""
    return re.sub(r"'[^']*'|\d+", "", problem.partition(": ")[2])
