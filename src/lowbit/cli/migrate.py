"""`lowbit migrate`: the same quantized layers in the convention of another program."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.checkpoint.migrate import migrate as run, refuse_unknown
from lowbit.cli import options
from lowbit.cli.output import asking, command, epilog, print_json, progress, say, show_notes
from lowbit.cli.whole import open_whole

EPILOG = epilog(
    "lowbit migrate flux-scaled-fp8.safetensors -o flux-fp8.safetensors",
    "lowbit migrate flux-fp8.safetensors -o flux-scaled-fp8.safetensors --to legacy",
    "lowbit migrate flux-fp8.safetensors -o flux-fp8-exact.safetensors --full-precision-matrix-mult .",
)


@command
def migrate(
    src: options.SourcePath,
    output: options.OutputText,
    to: Annotated[
        str,
        typer.Option(
            metavar="CONVENTION", help="A dialect that `lowbit formats` lists, or legacy (ComfyUI's older scaled_fp8)."
        ),
    ] = "current",
    full_precision_matrix_mult: options.FullPrecision = None,
    no_full_precision_matrix_mult: options.NoFullPrecision = None,
    jobs: options.Jobs = None,
    resume: options.Resume = True,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Rewrite a quantized checkpoint in the convention of another program; codes and scales stay as they are."""
    with asking():
        refuse_unknown(to)
    with open_whole(src, source_dialect) as source, progress("rewriting") as update:
        done = run(
            source,
            output,
            to,
            full_precision=full_precision_matrix_mult or (),
            no_full_precision=no_full_precision_matrix_mult or (),
            jobs=jobs,
            resume=resume,
            progress=update,
        )
    if as_json:
        print_json(done.to_json())
        return
    show_notes(done.notes)
    say(f"{done.target}: {len(done.layers)} layers in the {to} convention", "bold")
