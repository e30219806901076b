"""`lowbit inspect`: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import typer

from lowbit.checkpoint.inspection import Inspection, LayerGroup, inspect as look
from lowbit.checkpoint.source import open_source
from lowbit.cli import options
from lowbit.cli.output import Exit, command, epilog, print_json, say, show, show_notes, size, table

EPILOG = epilog("lowbit inspect flux-fp8.safetensors", "lowbit inspect qwen-image-nvfp4/ --json | jq .problems")


@command
def inspect(
    src: options.SourcePath, source_dialect: options.SourceDialect = None, as_json: options.AsJson = False
) -> None:
    """Show what a checkpoint holds, one line a group of layers, and everything that is wrong with it.

    Reads headers, markers and scales only. Ends with 1 when there is a problem.
    """
    with open_source(src, source_dialect) as source:
        found = look(source)
    if as_json:
        print_json({**found.to_json(), "exit_code": int(Exit.FOUND if found.problems else Exit.OK)})
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(Exit.FOUND)


def _show(found: Inspection) -> None:
    for component, dialect in found.dialects.items():
        where = f"{found.path}, {component}" if component else found.path
        say(f"{where}: {f'quantized, written as {dialect}' if dialect else 'not quantized'}", "bold")
    rows = table(
        "layers", "x", "format", "shape", "stored as", "bytes", "bits/weight", right=("x", "bytes", "bits/weight")
    )
    for group in found.groups:
        rows.add_row(
            group.name,
            str(group.count),
            group.format or "-",
            "x".join(map(str, group.shape)) or "one value",
            _stored(group),
            size(group.bytes),
            f"{group.bits_per_weight:.2f}",
        )
    show(rows)
    layers = sum(group.count for group in found.quantized)
    weights, count = sum(group.weights for group in found.quantized), sum(group.bytes for group in found.quantized)
    about = f", {8 * count / weights:.2f} bits a weight" if weights else ""
    say(f"{size(found.bytes)}; {layers} quantized layers{about}")
    show_notes(found.notes)
    for problem in found.problems:
        say(f"problem: {problem}", "red")
    say(f"{len(found.problems)} problems" if found.problems else "no problems")


def _stored(group: LayerGroup) -> str:
    return "; ".join(f"{role} {spec}".strip() for role, spec in group.tensors.items() if role != "marker")
