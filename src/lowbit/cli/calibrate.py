"""`lowbit calibrate`: the statistics that calibrated solvers work with, in one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lowbit.calibration import StatisticsCollection
from lowbit.calibration.options import AUTO, as_bytes
from lowbit.calibration.target_file import STATISTICS
from lowbit.calibration.time_embedding import GUIDANCE
from lowbit.checkpoint.eligibility import dtype_name
from lowbit.checkpoint.target import check_file_target, refuse_inputs
from lowbit.cli import options
from lowbit.cli.beside import files_of
from lowbit.cli.calibrating import Wishes, from_factory, from_text, imported, merged, modulation
from lowbit.cli.given import refuse_idle
from lowbit.cli.output import asking, command, epilog, hearing, parse_dtype, print_json, say, show, size, table, warn
from lowbit.errors import PlanError
from lowbit.integrations.text_batches import BATCH_SIZE, MAX_TOKENS, SAMPLES, VARIED

EPILOG = epilog(
    "lowbit calibrate llama/ -o stats.safetensors",
    "lowbit calibrate llama/ --text prompts.txt -o stats.safetensors",
    "lowbit calibrate qwen-image.safetensors --module my_package:make -o stats.safetensors",
    "lowbit calibrate qwen-image.safetensors --timesteps -o stats.safetensors",
    "lowbit calibrate --merge monday.safetensors tuesday.safetensors -o both.safetensors",
    "lowbit calibrate llama/ --imatrix llama.imatrix -o stats.safetensors",
)
_OF_TEXT = ("samples", "vary", "max_tokens", "batch_size", "device", "dtype")
_OF_SAMPLES = ("broad", "gradients", "layers", "memory", "full_up_to")
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_SHOWN = 12  # inputs in the table, those with the fewest tokens a channel
_WHAT = "--text FILE, --builtin-text, --module PACKAGE:FACTORY, --timesteps, --merge or --imatrix FILE"

_Paths = Annotated[
    list[Path] | None,
    typer.Argument(
        readable=False,
        metavar="[MODEL]",
        help="A model folder (text), the checkpoint that gives the names (--module, --imatrix), files (--merge).",
        show_default=False,
    ),
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(
        readable=False,
        metavar="FILE",
        help="Run the model folder on this text; may be repeated.",
        show_default=False,
    ),
]
_WithBuiltin = Annotated[
    bool,
    typer.Option(
        "--builtin-text",
        help="Run it on the text of many kinds that comes with lowbit, too; alone where nothing else is asked for.",
    ),
]
_Module = Annotated[
    str,
    typer.Option(
        metavar="PACKAGE:FACTORY",
        help="Run what this function (or FILE.py:FUNCTION) returns: a module, and an iterable of its inputs.",
        show_default=False,
    ),
]
_Timesteps = Annotated[
    bool,
    typer.Option(
        "--timesteps",
        help="Compute the inputs of modulation layers from the checkpoint's own time MLP, without data.",
    ),
]
_Guidance = Annotated[
    float, typer.Option(metavar="G", help="With --timesteps: the guidance, for models that embed it.")
]
_Merge = Annotated[bool, typer.Option("--merge", help="Join statistics files of one model into one.")]
_Imatrix = Annotated[
    Path | None,
    typer.Option(readable=False, metavar="FILE", help="Import an importance matrix of llama.cpp.", show_default=False),
]
_Samples = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help=rf"Lines or windows of the text to run. \[default: {SAMPLES}; twice as many with the built-in text]",
        show_default=False,
    ),
]
_Vary = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Run each a second time with this share of its tokens replaced at random, for statistics that hold "
        rf"for other text. \[default: {VARIED:g}; 0 with the built-in text and where the next token is predicted]",
        show_default=False,
    ),
]
_MaxTokens = Annotated[int, typer.Option(min=1, metavar="L", help="Tokens of one of them.")]
_BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="B",
        help=rf"How many at once. \[default: {BATCH_SIZE}; 1 with gradients where the next token is predicted]",
        show_default=False,
    ),
]
_Broad = Annotated[
    bool,
    typer.Option(
        "--broad",
        help="The samples are of as many kinds as what the model will meet, as the built-in text is: trust them.",
    ),
]
_Gradients = Annotated[
    bool | None,
    typer.Option(
        "--gradients/--no-gradients",
        help="Run the model backward too: solvers then lower the error of the model's output, not of each layer's. "
        r"\[default: for model folders]",
        show_default=False,
    ),
]
_Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where the model folder runs.")]
_Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help=f"What the model folder runs in: {', '.join(_DTYPES)}, or {AUTO}: on a CPU bfloat16 where that is "
        "fast, else float32; elsewhere what it is stored in.",
    ),
]
_Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", metavar="REGEX", help="Only these linears; may be repeated.", show_default=False),
]
_Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Memory for second moments, such as 8GiB; what does not fit takes more passes. auto: half of what is "
        "free, with gradients a third for them and a third for the inputs.",
    ),
]
_FullUpTo = Annotated[
    int | None,
    typer.Option(min=0, metavar="K", help="Keep only the diagonal of wider inputs.", show_default=False),
]


@command
def calibrate(
    context: typer.Context,
    output: options.OutputText,
    paths: _Paths = None,
    text: _Text = None,
    with_builtin: _WithBuiltin = False,
    module: _Module = "",
    timesteps: _Timesteps = False,
    guidance: _Guidance = GUIDANCE,
    merge: _Merge = False,
    imatrix: _Imatrix = None,
    samples: _Samples = None,
    vary: _Vary = None,
    max_tokens: _MaxTokens = MAX_TOKENS,
    batch_size: _BatchSize = None,
    broad: _Broad = False,
    gradients: _Gradients = None,
    device: _Device = "cpu",
    dtype: _Dtype = AUTO,
    layers: _Layers = None,
    memory: _Memory = AUTO,
    full_up_to: _FullUpTo = None,
    resume: options.Resume = True,
    as_json: options.AsJson = False,
) -> None:
    """Run a model on data and keep what the inputs of its layers look like, for the solvers of `lowbit convert`.

    Per input: the second moment H of one half of the samples and of the other, ranges, means and some rows. The file
    appears when it is complete. An interrupted run goes on where it stopped when the same command is given again.
    """
    with asking():
        room = {"memory": as_bytes(memory), "full_up_to": full_up_to}
        how: dict[str, Any] = {"layers": layers, **room, "resume": resume, "broad": broad}
        chosen = _refuse_several(
            bool(paths),
            text=bool(text) or with_builtin,
            module=bool(module),
            timesteps=timesteps,
            merge=merge,
            imatrix=imatrix is not None,
        )
        given = _paths(paths or [], chosen)
        _refuse_idle(context, chosen)
        runs_in = None if dtype == AUTO else parse_dtype(dtype, _DTYPES, AUTO)
    _refuse_input(output, [*given, *(text or []), *([imatrix] if imatrix is not None else [])])
    target = Path(output)
    wishes = Wishes(
        output=target,
        samples=samples,
        max_tokens=max_tokens,
        batch_size=batch_size,
        vary=vary,
        gradients=gradients,
        device=device,
        dtype=runs_in,
        options=how,
    )
    with hearing() as warnings:
        if chosen == "text":
            found: StatisticsCollection = from_text(given[0], text or [], wishes, with_builtin=with_builtin or not text)
        elif module:
            found = from_factory(given[0] if given else None, module, wishes)
        elif timesteps:
            found = modulation(given[0], target, guidance)
        elif imatrix is not None:
            found = imported(given[0], imatrix, target)
        else:
            found = merged(given, target)
    _tell(found, target, warnings, as_json=as_json)


def _refuse_several(paths: bool, **given: bool) -> str:
    """What was asked for, by its option; text where only paths were named."""
    chosen = [name for name, there in given.items() if there]
    if len(chosen) > 1 or not (chosen or paths):
        raise PlanError(f"say what to do by one of {_WHAT}" + (f", not {len(chosen)} of them" if chosen else ""))
    return chosen[0] if chosen else "text"


def _refuse_idle(context: typer.Context, chosen: str) -> None:
    """Refuse options that say something about a text, about samples, or about guidance, where there are none."""
    if chosen != "text":
        refuse_idle(context, f"is of a text, and --{chosen} runs none", *_OF_TEXT)
    if chosen not in ("text", "module"):
        refuse_idle(context, f"is of samples that are run, and --{chosen} runs none", *_OF_SAMPLES)
    if chosen != "timesteps":
        refuse_idle(context, "is of --timesteps, which was not asked for", "guidance")


def _paths(paths: list[Path], chosen: str) -> list[Path]:
    least, most, what = {
        "text": (1, 1, "the model folder"),
        "module": (0, 1, "at most the checkpoint whose names count"),
        "timesteps": (1, 1, "the checkpoint"),
        "imatrix": (1, 1, "the checkpoint that it is of"),
        "merge": (2, sys.maxsize, "two or more statistics files"),
    }[chosen]
    if not least <= len(paths) <= most:
        option = "a text or none" if chosen == "text" else f"--{chosen}"
        raise PlanError(f"{option}: name {what} before the options; {len(paths)} paths were given")
    return paths


def _refuse_input(output: str, read: list[Path]) -> None:
    """Refuse to write statistics over what they are taken from: a weight file, a text. Raises `WriteError`."""
    check_file_target(output, STATISTICS)
    refuse_inputs([Path(output)], files_of(read))


def _tell(found: StatisticsCollection, output: Path, told: list[str], *, as_json: bool) -> None:
    for line in found.warnings():
        warn(line)
    if as_json:
        warnings = {"warnings": [*told, *found.warnings()]}
        print_json({"target": str(output), "bytes": output.stat().st_size, **found.describe(), **warnings})
        return
    contents = found.contents
    numbers = ("K", "tokens", "held out", "T/N")
    rows = table("input of", *numbers, "H", title="inputs, those with the fewest tokens a channel first", right=numbers)
    ranked = sorted(contents.inputs.items(), key=lambda item: item[1].tokens_per_channel)
    for key, facts in ranked[:_SHOWN]:
        first, *others = contents.sharing(key)
        rows.add_row(
            f"{first} and {len(others)} more" if others else first,
            str(facts.k),
            str(facts.tokens),
            str(facts.held_out_tokens),
            f"{facts.tokens_per_channel:.2f}",
            facts.kind,
        )
    show(rows)
    if len(ranked) > _SHOWN:
        say(f"and {len(ranked) - _SHOWN} inputs more")
    if known := [layer for layer in contents.layers.values() if layer.output]:
        divided = [layer for layer in known if layer.blocks > 1]
        most = max((layer.shape[0] // layer.blocks for layer in divided), default=0)
        more = f", of {len(divided)} in blocks of up to {most} rows: more memory holds larger ones" if divided else ""
        say(f"and the gradients at the outputs of {len(known)} of {len(contents.layers)} layers{more}")
    say(
        f"{output}: statistics of {len(contents.layers)} layers with {len(contents.inputs)} inputs, "
        f"{size(output.stat().st_size)}",
        "bold",
    )
