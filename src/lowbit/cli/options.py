"""Options that several subcommands share, with one spelling and one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.checkpoint.dialects import dialects
from lowbit.formats import formats
from lowbit.solvers import AUTO, solvers
from lowbit.solvers.input_scale import FRACTION

_WRITTEN = [name for name, dialect in dialects().items() if dialect.writes]

SourcePath = Annotated[
    Path,
    typer.Argument(
        readable=False,
        metavar="SRC",
        help="A safetensors file, a *.safetensors.index.json, or a model folder.",
        show_default=False,
    ),
]
_OUTPUT = typer.Option(
    "-o",
    "--output",
    metavar="OUT",
    help="File or folder to write. It appears when it is complete: a file then replaces an old one, a folder must "
    "not exist or be empty.",
    show_default=False,
)
OutputText = Annotated[str, _OUTPUT]  # with the separator at its end that says a folder is meant: a Path has none
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, metavar="N", help="Worker threads; by default one a core.", show_default=False),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="Where weights are solved: cpu, or a GPU such as cuda or cuda:1."),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with the work of an interrupted run.")]

FormatSpec = Annotated[
    str,
    typer.Option(
        "--format",
        "-f",
        metavar="SPEC",
        help=f"Format for all weights: {', '.join(formats())}. See `lowbit formats`.",
        show_default=False,
    ),
]
Solver = Annotated[
    str, typer.Option(metavar="NAME", help=f"Who chooses codes and scales: {', '.join([AUTO, *solvers()])}.")
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Model family whose sensitive layers stay: auto (by the names in the file), none, or a family.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Leave layers alone whose name matches; may be repeated.", show_default=False),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Consider no other layers than these; may be repeated.", show_default=False),
]
LayerRules = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="REGEX=FORMAT",
        help="Another format for some layers, even those that the preset keeps; the first match wins.",
        show_default=False,
    ),
]
Convolutions = Annotated[
    bool,
    typer.Option(
        "--convolutions",
        help="Quantize the kernels of convolutions, too, which otherwise only --layer does; not of transposed ones, "
        "which a file does not tell apart: keep those (--keep).",
    ),
]
BankTransposed = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help=r"Banks of experts whose weight is \[experts, in, out], as GPT-OSS has them; all others are taken for "
        r"\[experts, out, in].",
        show_default=False,
    ),
]
Dialect = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"How layers are written: {', '.join(_WRITTEN)}. See `lowbit formats`."),
]


def _refuse_dry_run(value: bool) -> bool:
    if value:
        raise typer.BadParameter("`lowbit plan` shows what would be done; give it the same SRC and options without -o")
    return value


# Asked for before anything else is, so that what a dry run does not need (-o) is not missed first.
DryRun = Annotated[bool, typer.Option("--dry-run", hidden=True, is_eager=True, callback=_refuse_dry_run)]


def _known_dialect(name: str | None) -> str | None:
    if name is not None and name not in dialects():
        raise typer.BadParameter(f"{name!r} is unknown; the dialects are {', '.join(dialects())}")
    return name


SourceDialect = Annotated[
    str | None,
    typer.Option(
        callback=_known_dialect,
        metavar="NAME",
        help="Read the source in this dialect, for files that do not say how their weights are stored, such as bfl.",
        show_default=False,
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(
        readable=False,
        metavar="FILE",
        help="What calibration saw of the layers' inputs, by `lowbit calibrate`: solvers then minimize the error of "
        "the output.",
        show_default=False,
    ),
]
InputScales = Annotated[
    Path | None,
    typer.Option(
        readable=False,
        metavar="FILE",
        help="The scales that formats with input_scale=true store, instead of calibrating: a JSON object of numbers by "
        "layer, or a checkpoint with tensors <layer>.input_scale.",
        show_default=False,
    ),
]
InputPercentile = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION",
        help="How much of the input's elements such a scale covers that --stats tells; the rest is clipped. "
        rf"\[default: {FRACTION}]",
        show_default=False,
    ),
]
FoldScales = Annotated[
    bool,
    typer.Option(
        "--fold-scales",
        help="Scale the inputs of layers by what --stats saw of them (AWQ, SmoothQuant), at no cost at run time: the "
        "norm or linear before each group of layers takes the scale. Llama-like models only.",
    ),
]
ShareLowRank = Annotated[
    bool,
    typer.Option(
        "--share-low-rank",
        help="svdquant_w4a4: layers that read the same input (query, key, value) get one smooth_factor and one "
        "proj_down, so that a runtime rounds that input once; as --stats knows, or by their names.",
    ),
]
DropUnused = Annotated[
    bool,
    typer.Option(
        "--drop-unused",
        help="Leave out what the preset says that this use of the model never needs, such as T5's decoder.",
    ),
]
FullPrecision = Annotated[
    list[str] | None,
    typer.Option(
        "--full-precision-matrix-mult",
        metavar="REGEX",
        help="Layers in fp8, mxfp8 or nvfp4 whose activations ComfyUI must not quantize ('.' for all): their markers "
        "say so; may be repeated.",
        show_default=False,
    ),
]
NoFullPrecision = Annotated[
    list[str] | None,
    typer.Option(
        "--no-full-precision-matrix-mult",
        metavar="REGEX",
        help="Layers whose markers must not say so any more, even where the other option names them; may be repeated.",
        show_default=False,
    ),
]
ErrorLora = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.safetensors",
        help="Write a LoRA beside the checkpoint that makes up for what was lost, best with --stats.",
        show_default=False,
    ),
]
LoraRank = Annotated[int, typer.Option(min=1, metavar="R", help="Rank of --error-lora.")]
LoraLayers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX", help="Correct no other layers with --error-lora; may be repeated.", show_default=False
    ),
]
LoraPrefix = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="What the LoRA's names have in front of the checkpoint's, such as diffusion_model. for ComfyUI.",
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Choose formats layer by layer for the least error in this size: 0.3x of the source, 1.2GB, or bytes.",
        show_default=False,
    ),
]
TargetSqnr = Annotated[
    float | None,
    typer.Option(
        metavar="DB",
        help="Choose formats layer by layer for the least size with this output SQNR: the mean of the layers' relative "
        "errors, in dB.",
        show_default=False,
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPECS",
        help="The formats that a target chooses from, with ';' between them or by repeating the option; staying as it "
        "is always is one more choice.",
        show_default=False,
    ),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Convert layers that are quantized already, with the loss of both.")
]
