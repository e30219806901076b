"""`lowbit export`: a checkpoint as a GGUF file, for llama.cpp and what builds on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from lowbit.checkpoint.export_gguf import TYPES, export_gguf
from lowbit.checkpoint.gguf_names import ARCHITECTURES
from lowbit.checkpoint.plan_data import Plan
from lowbit.checkpoint.source import open_source
from lowbit.cli import options
from lowbit.cli.known import statistics_of, tell_other_weights
from lowbit.cli.output import asking, command, epilog, print_json, say, size
from lowbit.errors import PlanError

EPILOG = epilog(
    "lowbit export tiny-llama/ -o tiny-llama-q8_0.gguf --architecture llama",
    "lowbit export flux.safetensors -o flux-q4_0.gguf --type Q4_0 --architecture flux",
)


@command
def export(
    src: options.SourcePath,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="File to write.", show_default=False)
    ],
    kind: Annotated[
        str, typer.Option("--type", metavar="TYPE", help=f"Type of all weights: {', '.join(TYPES)}.")
    ] = "Q8_0",
    plan: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE",
            help="A plan whose formats are gguf(type=...), in place of --type.",
            show_default=False,
        ),
    ] = None,
    architecture: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Written as general.architecture. Tensors get llama.cpp's names for: " + ", ".join(ARCHITECTURES),
            show_default=False,
        ),
    ] = "",
    component: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which model, where the source has several.", show_default=False),
    ] = None,
    requantize: options.Requantize = False,
    stats: options.Stats = None,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint as a GGUF file. Blocks that have the type already are copied bit for bit."""
    if plan is None and kind not in TYPES:
        with asking():
            raise PlanError(f"--type {kind!r} is unknown; choose one of {', '.join(TYPES)}")
    chosen = kind if plan is None else Plan.load(plan)
    with open_source(src, source_dialect) as source, statistics_of(source, stats) as known:
        warnings = tell_other_weights(source, known)
        done = export_gguf(
            source,
            output,
            chosen,
            architecture=architecture,
            requantize=requantize,
            statistics=known,
            component=component,
        )
    if as_json:
        print_json({**vars(done), "target": str(done.target), "notes": list(done.notes), "warnings": warnings})
        return
    for note in done.notes:
        say(f"note: {note}", "yellow")
    counts = ", ".join(f"{count} {name}" for name, count in Counter(done.types.values()).most_common())
    say(f"{done.target}: {size(done.bytes)}; {counts}", "bold")
