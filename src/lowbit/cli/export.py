"""`lowbit export`: a checkpoint as a GGUF file, for llama.cpp and what builds on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from lowbit.checkpoint.export_gguf import TYPES, ExportReport, export_gguf
from lowbit.checkpoint.gguf_names import ARCHITECTURES
from lowbit.checkpoint.layer_groups import grouped
from lowbit.checkpoint.plan_data import Plan
from lowbit.checkpoint.presets import get_preset
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.target import refuse_inputs
from lowbit.cli import options
from lowbit.cli.beside import files_of
from lowbit.cli.given import refuse_idle
from lowbit.cli.known import statistics_of, tell_other_weights
from lowbit.cli.output import asking, command, epilog, print_json, say, show, show_notes, size, table, warn
from lowbit.errors import PlanError
from lowbit.numerics.gguf_encode import WRITABLE

EPILOG = epilog(
    "lowbit export tiny-llama-f16.gguf -o tiny-llama-q8_0.gguf",
    "lowbit export flux.safetensors -o flux-q4_0.gguf --type Q4_0 --architecture flux",
)


@command
def export(
    context: typer.Context,
    src: options.SourcePath,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT.gguf", help="File to write.", show_default=False)
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
    preset: options.Preset = "auto",
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
    """Write a checkpoint as a GGUF file. Blocks that have the type already are copied bit for bit.

    Layers that `convert` keeps for the model family (--preset) stay in 16 bits here, too.
    """
    with asking():
        _check(context, kind, plan, preset)
    refuse_inputs([Path(output)], files_of((plan, stats)))
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
            preset=preset,
        )
    if as_json:
        lists = {"notes": list(done.notes), "warnings": [*warnings, *done.warnings]}
        print_json({**vars(done), "target": str(done.target), **lists})
        return
    _show(done)


def _check(context: typer.Context, kind: str, plan: Path | None, preset: str) -> None:
    """Refuse what no source could make right. Raises `PlanError`."""
    if plan is not None:
        refuse_idle(context, "is said by the plan file already", "preset")
    elif kind not in TYPES:
        raise PlanError(f"--type {kind!r} is unknown; choose one of {', '.join(TYPES)}")
    elif kind not in WRITABLE:
        refuse_idle(context, f"says what is not quantized, and --type {kind} quantizes nothing", "preset")
    if preset not in ("auto", "none"):
        get_preset(preset)


def _show(done: ExportReport) -> None:
    if done.kept:
        rows = table("layers kept", "x", "why", right=("x",))
        for name, found in grouped(done.kept.items(), lambda layer: layer[0], lambda layer: layer[1]):
            rows.add_row(name, str(len(found)), found[0][1])
        show(rows)
    if done.preset:
        say(f"preset {done.preset}: {done.preset_why}")
    show_notes(done.notes)
    for warning in done.warnings:
        warn(warning)
    counts = ", ".join(f"{count} {name}" for name, count in Counter(done.types.values()).most_common())
    say(f"{done.target}: {size(done.bytes)}; {counts}", "bold")
