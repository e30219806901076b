"""`lowbit lora`: what an adapter changes, and a checkpoint with it baked in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import Source, open_source
from lowbit.cli import options
from lowbit.cli.output import asking, command, epilog, print_json, progress, say, show, table
from lowbit.cli.whole import open_whole
from lowbit.errors import PlanError
from lowbit.lora import Adapter, BakeReport, bake_checkpoint, read_adapter
from lowbit.lora.bake_checkpoint import layer_shapes
from lowbit.lora.bake_layer import METHODS
from lowbit.lora.layers import check_strength

EPILOG = epilog(
    "lowbit lora inspect style.safetensors --for flux-nvfp4.safetensors",
    "lowbit lora bake flux-nvfp4.safetensors style.safetensors -o flux-style-nvfp4.safetensors --strength 0.8",
)
AdapterPath = Annotated[
    Path,
    typer.Argument(
        readable=False,
        metavar="ADAPTER",
        help="A file of LoRA, LoHa, LoKr or DoRA, or a PEFT folder.",
        show_default=False,
    ),
]


@command
def inspect(
    adapter: AdapterPath,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--for", readable=False, metavar="SRC", help="Find its layers in this checkpoint.", show_default=False
        ),
    ] = None,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the layers that an adapter changes, with their ranks and scales, and where they are in a checkpoint."""
    read = read_adapter(adapter)
    places: dict[str, str] = {}
    if checkpoint is not None:
        with open_source(checkpoint, source_dialect) as source:
            places = _places(read, source)
    if as_json:
        print_json({"layers": [_row(read, name, places) for name in read.layers], "notes": list(read.notes)})
        return
    shown = table("layer", "kind", "rank", "scale", "changes", "in the checkpoint", right=("rank", "scale"))
    for name, delta in read.layers.items():
        shape = "x".join(map(str, delta.shape))
        shown.add_row(
            name, delta.kind, str(delta.rank) if delta.rank else "-", f"{delta.scale:g}", shape, places.get(name, "-")
        )
    show(shown)
    for note in read.notes:
        say(f"note: {note}", "yellow")
    found = f"; {len(places)} of them are in {checkpoint}" if checkpoint is not None else ""
    say(f"{adapter}: changes {len(read.layers)} layers{found}", "bold")


@command
def bake(
    src: options.SourcePath,
    adapter: AdapterPath,
    output: options.OutputText,
    strength: Annotated[float, typer.Option(metavar="S", help="How much of the change; may be negative.")] = 1.0,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How codes take the change: {', '.join(METHODS)}; by default what suits each layer.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of stochastic rounding.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Refuse a LoRA of which some layers are not in the checkpoint.")
    ] = True,
    jobs: options.Jobs = None,
    resume: options.Resume = True,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint with a LoRA baked into its weights, quantized ones in the format that they have.

    A small change would be lost by rounding to nearest: codes move so that it survives on the whole, and the table
    says how much of it did. All other tensors and the header stay as they are.
    """
    with asking():
        check_strength(strength)
        if rounding is not None and rounding not in METHODS:
            raise PlanError(f"--rounding {rounding!r} is unknown; choose one of {', '.join(METHODS)}")
    with open_whole(src, source_dialect) as source, progress("baking") as update:
        done = bake_checkpoint(
            source,
            output,
            adapter,
            strength=strength,
            rounding=rounding,
            seed=seed,
            strict=strict,
            jobs=jobs,
            resume=resume,
            progress=update,
        )
    if as_json:
        print_json(done.to_json())
    else:
        _show(done)


def _row(adapter: Adapter, name: str, places: dict[str, str]) -> dict[str, object]:
    delta = adapter.layers[name]
    found = {"in": places[name]} if name in places else {}
    return {
        "layer": name,
        "kind": delta.kind,
        "rank": delta.rank,
        "scale": delta.scale,
        "shape": list(delta.shape),
        **found,
    }


def _show(done: BakeReport) -> None:
    rows = table("layer", "by", "of the change", "noise", right=("of the change", "noise"))
    for name, layer in done.layers.items():
        rows.add_row(name, layer.method, f"{100 * layer.recovered:.1f} %", f"{layer.noise:.2f}")
    show(rows)
    for note in done.notes:
        say(f"note: {note}", "yellow")
    if done.unmatched:
        say(f"not in the checkpoint: {', '.join(done.unmatched)}", "yellow")
    say(f"{done.target}: {len(done.layers)} layers changed, {done.copied} tensors copied", "bold")


def _places(adapter: Adapter, source: Source) -> dict[str, str]:
    """The adapter's names of the layers that are in a checkpoint, and what they are called there."""
    found: dict[str, str] = {}
    for component in source.components:
        held = look_for_layers(source, component)
        found |= {own: held.full_name(name) for own, name in adapter.find(layer_shapes(held)).names.items()}
    return found
