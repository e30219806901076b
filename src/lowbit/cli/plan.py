"""`lowbit plan`: what a conversion would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.checkpoint.source import open_source
from lowbit.cli import options
from lowbit.cli.output import command, epilog, print_json, say
from lowbit.cli.planning import Wishes, plan_totals, show_plan

EPILOG = epilog(
    "lowbit plan flux.safetensors --format nvfp4",
    "lowbit plan flux.safetensors --format nvfp4 --layer 'img_mod=fp8_e4m3' -o plan.json",
    "lowbit convert flux.safetensors -o flux-nvfp4.safetensors --plan plan.json",
)


@command
def plan(
    src: options.SourcePath,
    format: options.FormatSpec,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE.json", help="Write the plan here, to be edited.", show_default=False
        ),
    ] = None,
    solver: options.Solver = "auto",
    preset: options.Preset = "auto",
    keep: options.Keep = None,
    only: options.Only = None,
    layer: options.LayerRules = None,
    dialect: options.Dialect = "comfy",
    requantize: options.Requantize = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what a conversion would do: what becomes of each layer and why, and the final size."""
    wishes = Wishes(format, solver, preset, keep or (), only or (), layer or (), dialect, requantize)
    wishes.check()
    with open_source(src) as source:
        made = wishes.plan(source)
    if output is not None:
        made.save(output)
    if as_json:
        print_json({**made.to_json(), "totals": plan_totals(made)})
        return
    show_plan(made)
    if output is not None:
        say(f"written to {output}; edit it, then: lowbit convert {src} -o OUT --plan {output}")
